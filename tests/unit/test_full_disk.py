"""A disk that fills up, at many sizes: the error names the folder and both sizes; what was there before is whole."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ds_wsi.runtime import full_disk
from ds_wsi.runtime.files import atomic_path, write_text
from ds_wsi.runtime.full_disk import DiskFullError, naming_full_disk

NEEDS_MOUNT = pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
    reason="needs the right to mount",
)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        OSError(errno.EFBIG, os.strerror(errno.EFBIG)),
        OSError("Can't synchronously write data (file write failed: errno = 28, error message = 'No space left')"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_whoever_says_it_the_folder_and_the_sizes_are_named(error, tmp_path):
    with pytest.raises(DiskFullError) as caught, naming_full_disk(tmp_path, 3 * 2**20):
        raise error
    words = str(caught.value)
    assert words.startswith(f"{tmp_path} must have room for what is written, got ")
    assert "3.0 MiB needed" in words
    assert " free. HINT: free space there" in words
    assert caught.value.__cause__ is error


def test_a_disguise_counts_where_the_disk_is_full_alone(tmp_path, monkeypatch):
    torchs = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    with pytest.raises(RuntimeError, match="unexpected pos") as caught, naming_full_disk(tmp_path):
        raise torchs
    assert caught.value is torchs
    monkeypatch.setattr(full_disk, "free_bytes", lambda folder: 4096)
    with pytest.raises(DiskFullError, match=r"more than 4\.0 KiB needed, 4\.0 KiB free"), naming_full_disk(tmp_path):
        raise torchs
    with pytest.raises(ValueError, match="I/O error"), naming_full_disk(tmp_path):
        raise ValueError("I/O error")


def test_what_was_written_is_told_and_removed_and_what_was_there_stays(tmp_path, monkeypatch):
    write_text(tmp_path / "x.txt", "before")

    def write():
        with atomic_path(tmp_path / "x.txt") as path:
            path.write_bytes(b"x" * 2048)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(full_disk, "free_bytes", lambda folder: 0)
    with pytest.raises(DiskFullError, match=r"more than 2\.\d KiB needed, 0 bytes free"):
        write()
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.txt"]
    assert (tmp_path / "x.txt").read_text() == "before"


def test_a_command_prints_it_and_ends_with_the_status_of_a_users_error(tmp_path, capsys, monkeypatch):
    from ds_wsi.cli import main
    from ds_wsi.commands import report as command

    def run(options):
        with naming_full_disk(tmp_path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(command, "run_report", run)
    assert main(["report", "run"]) == 2
    assert f"{tmp_path} must have room for what is written, got a full disk" in capsys.readouterr().err


WRITERS = """
import sys
from pathlib import Path
import h5py, numpy as np, torch
from ds_wsi.bags.features import write_features
from ds_wsi.models.config import save_weights
from ds_wsi.runtime.files import atomic_path, write_text
from ds_wsi.runtime.full_disk import DiskFullError
disk, large = Path(sys.argv[1]), torch.zeros(2**21)  # 8 MiB
def hdf5(path):
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("x", data=large.numpy())
def torchs(path):
    with atomic_path(path) as temporary:
        torch.save(large, temporary)
def arrows(path):
    import pyarrow as pa
    with atomic_path(path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
        with pa.ipc.new_stream(sink, pa.schema([("x", pa.float32())])) as out:
            out.write_batch(pa.record_batch([pa.array(large.numpy())], names=["x"]))
def picture(path):
    from matplotlib.figure import Figure
    from matplotlib import image
    with atomic_path(path.with_suffix(".png")) as temporary:
        image.imsave(temporary, np.random.default_rng(0).random((1500, 1500, 3)))
writers = {
    "weights": lambda path: save_weights(path, {"w": large}),
    "features": lambda path: write_features(path, large.view(-1, 2), torch.zeros(2**20, 2).long(), 1, {}),
    "text": lambda path: write_text(path, "x" * 2**23),
    "hdf5": hdf5, "torch": torchs, "arrow": arrows, "picture": picture,
}
for name, write in writers.items():
    try:
        write(disk / name)
        print(name, "had room")
    except DiskFullError as error:
        print(name, error)
    left = sorted(path.name for path in disk.iterdir())
    assert not left, (name, left)
"""


@NEEDS_MOUNT
def test_every_writer_on_a_full_disk(tmp_path):
    mount = f'mount -t tmpfs -o size=4m tmpfs {tmp_path} && exec "$0" "$@"'
    arguments = [sys.executable, "-c", WRITERS, tmp_path]
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount, *arguments], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert {*said} == {"weights", "features", "text", "hdf5", "torch", "arrow", "picture"}
    for name, words in said.items():
        assert words.startswith(f"{tmp_path} must have room for what is written, got a full disk ("), (name, words)
    assert "8.0 MiB needed" in said["weights"]
    assert "24.0 MiB needed" in said["features"]


COMMANDS = """
import os, shutil, sys, traceback
from pathlib import Path
sys.path.insert(0, {tests!r})
from tiny_runs import listing, train, write_cohort
from ds_wsi.cli import main
disk, data, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
free = lambda: os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
def command():
    if kind == "train":
        if (disk / "run").exists():
            return train(data, disk / "run", "--resume_from_checkpoint", "latest")
        return train(data, disk / "run")
    options = ["--manifest", data / "manifest.csv", "--tile_size_px", 64, "--output_dir"]
    if kind == "store":
        return main(["tile", *map(str, [*options, data / "grids", "--store", disk / "store"])])
    options += [disk / "features", "--tiles_dir", data / "grids", "--encoder", "resnet10t"]
    return main(["features", *map(str, [*options, "--dataloader_num_workers", 0, "--device", "cpu"])])
def files():
    return {{name: entry for name, entry in listing(disk).items() if "ballast" not in str(name)}}
left = [int(size) for size in sys.argv[4:]]
for size in left:
    for place in disk.iterdir():
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    with open(disk / "ballast", "wb") as ballast:
        ballast.write(bytes(max(0, free() - size)))
    status = command()
    hidden = [path for path in disk.rglob(".ds_wsi-*.tmp")]
    assert not hidden, hidden
    print(size, status, flush=True)
    print(f"=== {{size}}", file=sys.stderr, flush=True)
(disk / "ballast").unlink()
print("with room:", command(), flush=True)
"""


@NEEDS_MOUNT
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("train", (0, 4096, 20_000, 60_000, 120_000, 200_000, 300_000, 400_000)),
        ("features", (0, 4096, 8192, 12_288, 16_384, 20_480, 32_768, 40_960)),
        ("store", (0, 4096, 12_288, 20_480, 40_960, 61_440, 81_920, 102_400)),
    ],
)
def test_commands_on_a_disk_that_fills_up(kind, sizes, tmp_path, demo_manifest):
    """Whatever is left of it, the command names the disk or comes to its end; given room, it goes on."""
    from tiny_runs import write_cohort

    disk, data = tmp_path / "disk", tmp_path / "data"
    disk.mkdir()
    if kind == "train":
        write_cohort(data)
    else:
        shutil.copytree(demo_manifest.parent, data)
    script = COMMANDS.format(tests=str(Path(__file__).parent))
    mount = f'mount -t tmpfs -o size=4m tmpfs {disk} && exec "$0" "$@"'
    arguments = [sys.executable, "-c", script, disk, data, kind, *map(str, sizes)]
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount, *arguments], capture_output=True, text=True, timeout=170)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-3000:]
    assert lines[-1] == "with room: 0", done.stderr[-3000:]
    parts = done.stderr.split("=== ")
    statuses = [line.split()[1] for line in lines if line.split()[0] in map(str, sizes)]
    assert len(statuses) == len(sizes)
    assert statuses[0] == "2"
    for status, part in zip(statuses, parts, strict=False):
        assert status in ("0", "2")
        assert "Traceback" not in part
        if status == "2":
            assert "must have room for what is written, got a full disk" in part
            assert str(disk) in part
            assert "free" in part
