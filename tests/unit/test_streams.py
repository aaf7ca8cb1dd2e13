"""Standard streams that are closed, read by nobody, full, or of another encoding: results are in their files."""

import ast
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import train, write_cohort

from ds_wsi.cli import main
from ds_wsi.runtime import streams
from ds_wsi.runtime.streams import show
from ds_wsi.slides.demo import write_pyramid

FILES = ["clam/patches/s.h5", "masks/s.geojson", "s.safetensors", "store/s.arrow", "store/store_summary.csv"]
FILES.append("tile_summary.csv")


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slide")
    picture = np.full((256, 256, 3), 240, np.uint8)
    picture[32:224, 32:224] = np.random.default_rng(0).integers(80, 200, (192, 192, 3))
    picture[32:224, 32:224, 1] //= 2
    write_pyramid(folder / "s.tiff", picture, mpp=0.5)
    (folder / "m.csv").write_text(f"slide_id,path\ns,{folder / 's.tiff'}\n")
    return folder


def tile(slide, folder, **streams_of):
    """All that `tile` writes, by a process of its own."""
    words = ["tile", "--manifest", slide / "m.csv", "--tile_size_px", 64, "--output_dir", folder, "--export", "clam"]
    words += ["--export_masks", folder / "masks", "--store", folder / "store"]
    command = [sys.executable, "-m", "ds_wsi.cli", *map(str, words)]
    return subprocess.run(command, check=False, timeout=120, **streams_of)


def require_files(folder):
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(FILES)


def test_results_whose_reader_is_gone_are_in_the_files(slide, tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = tile(slide, tmp_path / "t", stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 0, done.stderr.decode()
    assert b"roken pipe" not in done.stderr
    require_files(tmp_path / "t")


def test_messages_whose_reader_is_gone_change_no_status(slide, tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = tile(slide, tmp_path / "t", stdout=write, stderr=write)
    os.close(write)
    assert done.returncode == 0
    require_files(tmp_path / "t")


def test_closed_streams_are_opened_on_nothing(slide, tmp_path):
    """Also their numbers: else the next file that is opened would get what a library prints."""
    done = tile(slide, tmp_path / "t", preexec_fn=lambda: [os.close(number) for number in range(3)])
    assert done.returncode == 0
    require_files(tmp_path / "t")
    script = "from ds_wsi.runtime.streams import open_closed_streams as o; o(); import os, sys; n = os.open('x', 65)\n"
    script += (
        "os.write(n, b'%d %s' % (n, sys.stderr.name.encode() if sys.stdin.read() == '' else b'')); os.write(2, b'y')"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        timeout=60,
        cwd=tmp_path,
        preexec_fn=lambda: [os.close(number) for number in range(3)],
    )
    assert int((tmp_path / "x").read_text().split()[0]) > 2


def test_the_help_page_whose_reader_is_gone_ends_well():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "ds_wsi.cli", "--help"]
    done = subprocess.run(command, check=False, stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_one_place_prints():
    """The linter finds calls of `print`; handed on as a function it is another's."""
    package = Path(streams.__file__).parents[1]
    lines = [
        path.name
        for path in package.rglob("*.py")
        if path != Path(streams.__file__)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and node.id == "print"
    ]
    assert not lines


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_what_the_encoding_has_not_is_escaped(encoding, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    show("run\udcff is whole")
    show("plain")
    assert out.buffer.getvalue() == b"run\\udcff is whole\nplain\n"


def test_a_full_disk_below_standard_output_is_an_error_once(monkeypatch):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OSError, match="space"):
            show("results")
        show("goes nowhere")
        streams.settle_streams()


def test_what_was_left_to_be_flushed_onto_a_full_disk_is_an_error(monkeypatch):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        full.write("a library's")
        with pytest.raises(OSError, match="space"):
            streams.settle_streams()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = write_cohort(tmp_path_factory.mktemp("cohort"))
    assert train(folder, folder / "run", epochs=1) == 0
    return [str(folder / "run"), shutil.copytree(folder / "run", str(folder / os.fsdecode(b"r\xff")))]


def test_a_folder_that_is_no_utf_8_is_compared_and_reported(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert main(["compare", *runs, "--output_dir", str(tmp_path / "c")]) == 0, capsys.readouterr().err
    assert (tmp_path / "c" / "comparison.json").is_file()
    assert main(["report", *runs, "--output_dir", str(tmp_path / "r")]) == 0, capsys.readouterr().err
    assert {path.suffix for path in (tmp_path / "r").iterdir()} == {".csv", ".md", ".tex", ".html"}


def test_a_run_is_not_begun_in_such_a_folder(runs, tmp_path, capsys):
    """TensorBoard could not write there."""
    assert train(Path(runs[0]).parent, str(tmp_path / os.fsdecode(b"r\xff")), epochs=1) == 2
    assert r"--output_dir must be of UTF-8, got" in (told := capsys.readouterr().err)
    assert r"r\udcff. HINT" in told
    assert not list(tmp_path.iterdir())


def test_files_are_written_before_results_are_shown(runs, tmp_path, monkeypatch):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["compare", runs[0], runs[0], "--output_dir", str(tmp_path / "c")]) == 2
        monkeypatch.undo()
        full.close = lambda: None
    assert (tmp_path / "c" / "comparison.json").is_file()
