"""What is a whole checkpoint, which one is found, and which are deleted."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from checkpoint_cases import flip_byte, save, write_checkpoint
from logs import logged
from safetensors.torch import load_file

from ds_wsi.runtime.temporary import remove_left_behind
from ds_wsi.runtime.tensor_file import open_tensors, write_tensors
from ds_wsi.training import checkpoint
from ds_wsi.training.checkpoint import (
    FILE_LIST,
    find_checkpoint,
    list_checkpoints,
    read_state,
    remove_checkpoint,
    verify,
)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.fixture
def messages():
    with logged() as records:
        yield records


@pytest.fixture
def run(tmp_path):
    for step in (5, 10, 100):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    return tmp_path


def test_what_another_system_leaves_beside_weights_is_none_of_a_checkpoints(tmp_path):
    folder = write_checkpoint(tmp_path / "c")
    (folder / "._model.safetensors").write_bytes(b"of a Finder")
    assert verify(folder) is None


def test_a_sealed_checkpoint_is_whole(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint-1")
    assert verify(folder) is None
    listed = json.loads((folder / FILE_LIST).read_text())
    assert set(listed) == {"model.safetensors", "shards/rank_0.pt", "state.json", "empty"}
    assert listed["model.safetensors"]["bytes"] == 4096
    assert listed["empty"]["sha256"] == hashlib.sha256().hexdigest()


@pytest.mark.parametrize("name", ["model.safetensors", "shards/rank_0.pt"])
def test_what_is_torn_is_named(tmp_path, name):
    folder = write_checkpoint(tmp_path / "checkpoint-1")
    content = (folder / name).read_bytes()
    truncate(folder / name)
    assert verify(folder) == f"{name} has {len(content) - 1} bytes instead of {len(content)}"
    (folder / name).write_bytes(content)
    flip_byte(folder / name)
    assert verify(folder) == f"{name} has another SHA-256 than listed"
    (folder / name).unlink()
    assert verify(folder) == f"{name} is missing"


def test_a_missing_list_is_named(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint-1")
    (folder / FILE_LIST).unlink()
    assert verify(folder) == "files.json is missing"
    assert verify(tmp_path / "none") == "files.json is missing"


@pytest.mark.parametrize(
    "text", ["", '{"state.json": {"bytes": 11', "[]", "7", '{"state.json": 3}', '{"state.json": {"bytes": 11}}', "{}"]
)
def test_a_torn_list_is_named(tmp_path, text):
    folder = write_checkpoint(tmp_path / "checkpoint-1")
    (folder / FILE_LIST).write_text(text)
    assert "files.json" in verify(folder)


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "rank-00001.safetensors"])
def test_what_would_be_read_and_is_not_listed_is_named(tmp_path, name):
    """It would be used without its SHA-256."""
    folder = write_checkpoint(tmp_path / "checkpoint-1")
    listed = json.loads((folder / FILE_LIST).read_text())
    listed.pop(name, None)
    (folder / FILE_LIST).write_text(json.dumps(listed))
    (folder / name).touch()
    assert verify(folder) == f"files.json does not list {name}"
    (folder / name).unlink()
    assert (verify(folder) is None) == (name == "rank-00001.safetensors")


@pytest.mark.parametrize("name", [FILE_LIST, "state.json", "model.safetensors"])
def test_a_pipe_in_a_checkpoint_is_waited_for_nowhere(tmp_path, name, messages):
    folder = write_checkpoint(tmp_path / "checkpoint-1")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert verify(folder) == f"{name} is missing"
    if name == FILE_LIST:
        remove_checkpoint(folder)
        assert (folder / "state.json").is_file()
        assert "is kept" in messages[-1]
    listed = {"a": {"bytes": 0, "sha256": ""}}
    if name == "state.json":
        (folder / FILE_LIST).write_text(json.dumps(listed))
        assert "does not list" in verify(folder)
        with pytest.raises(ValueError, match=r"state\.json must be a file, got a pipe"):
            read_state(folder)


def test_any_flipped_byte_of_the_list_is_noticed(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint-1")
    content = (folder / FILE_LIST).read_bytes()
    for position in range(len(content)):
        if content[position : position + 1].isspace():
            continue
        (folder / FILE_LIST).write_bytes(content)
        flip_byte(folder / FILE_LIST, position)
        assert verify(folder) is not None, position


def test_checkpoints_are_ordered_by_step_and_others_are_not_listed(run):
    for name in ("checkpoint-x", "checkpoint-7.old", ".checkpoint-9.tmp", "my-checkpoint-3"):
        (run / name).mkdir()
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-100", "checkpoint-10", "checkpoint-5"]
    assert find_checkpoint(run, "latest") == run / "checkpoint-100"


def test_a_torn_newest_is_passed_over_logged_and_kept(run, messages):
    truncate(run / "checkpoint-100" / "state.json")
    assert find_checkpoint(run, "latest") == run / "checkpoint-10"
    (message,) = messages
    assert "checkpoint-100 is torn (state.json has 10 bytes instead of 11)" in message
    assert (run / "checkpoint-100").is_dir()


def test_where_all_are_torn_the_run_stops(run, messages):
    for folder in run.iterdir():
        truncate(folder / "state.json")
    with pytest.raises(ValueError, match=r"must hold a whole checkpoint, all 3 are torn.*HINT"):
        find_checkpoint(run, "latest")
    assert len(messages) == 3


def test_a_named_checkpoint_is_that_or_an_error(run):
    assert find_checkpoint(run, str(run / "checkpoint-5")) == run / "checkpoint-5"
    flip_byte(run / "checkpoint-5" / "model.safetensors")
    with pytest.raises(ValueError, match=r"got .*checkpoint-5: model\.safetensors has another SHA-256.*HINT"):
        find_checkpoint(run, str(run / "checkpoint-5"))
    with pytest.raises(ValueError, match=r"checkpoint-6: files\.json is missing"):
        find_checkpoint(run, str(run / "checkpoint-6"))


def test_no_checkpoint_yet_is_none(tmp_path, messages):
    assert find_checkpoint(tmp_path, "latest") is None
    assert find_checkpoint(tmp_path / "none", "latest") is None
    assert len(messages) == 2
    assert "no checkpoint" in messages[0]


def test_a_checkpoint_is_deleted_by_its_list_alone(run, tmp_path_factory, messages):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "state.json").write_text("theirs")
    folder = run / "checkpoint-5"
    (folder / "shards" / "notes.txt").write_text("the user's")
    (folder / "linked").symlink_to(outside)
    listed = json.loads((folder / FILE_LIST).read_text())
    strangers = {"linked/state.json", "../checkpoint-10/state.json", str(outside / "state.json")}
    (folder / FILE_LIST).write_text(json.dumps(listed | {name: {} for name in strangers}))
    remove_checkpoint(folder)
    left = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    assert left == ["linked", "shards", "shards/notes.txt"]
    assert (outside / "state.json").read_text() == "theirs"
    assert verify(run / "checkpoint-10") is None
    assert "checkpoint-5 is kept" in messages[0]
    remove_checkpoint(run / "checkpoint-10")
    assert not (run / "checkpoint-10").exists()


@pytest.mark.parametrize("room", [True, False])
def test_a_kill_while_a_checkpoint_is_deleted_leaves_it_whole_or_none(room, run, monkeypatch):
    if not room:  # on a full disk it is deleted in place, its list last
        monkeypatch.setattr(checkpoint, "temporary_folder", _no_room)
    folder, killed = run / "checkpoint-5", 0
    for number in range(20):
        child = os.fork()
        if child == 0:
            _killed_before_unlink(number, monkeypatch)
            remove_checkpoint(folder)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        killed += code == 9
        remove_left_behind(run)  # as the next start does
        assert not list(run.glob(".ds_wsi-*"))
        if room and folder.exists():
            assert verify(folder) is None
        if code == 0:
            break
    assert killed
    assert not folder.exists()
    assert verify(run / "checkpoint-10") is None


def _killed_before_unlink(number, monkeypatch):
    unlink, left = Path.unlink, iter(range(number))
    monkeypatch.setattr(Path, "unlink", lambda path: os._exit(9) if next(left, None) is None else unlink(path))


def _no_room(parent):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(parent))


def test_a_checkpoint_that_is_a_link_is_not_deleted(tmp_path, tmp_path_factory, messages):
    """One that was moved to another disk: nothing of it is deleted, and the run goes on."""
    for step in (1, 2):
        save(tmp_path, step)
    elsewhere = tmp_path_factory.mktemp("disk") / "checkpoint-1"
    (tmp_path / "checkpoint-1").rename(elsewhere)
    (tmp_path / "checkpoint-1").symlink_to(elsewhere)
    for step in (3, 4):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-3", "checkpoint-1"]
    assert verify(elsewhere) is None


def test_a_folder_without_a_list_is_not_deleted(run):
    (run / "checkpoint-5" / FILE_LIST).write_text("[")
    before = sorted(path.name for path in (run / "checkpoint-5").iterdir())
    remove_checkpoint(run / "checkpoint-5")
    assert sorted(path.name for path in (run / "checkpoint-5").iterdir()) == before


def test_saving_deletes_only_checkpoints_that_were_written_here(tmp_path, messages):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "weights.bin").write_text("another program's")
    (tmp_path / "checkpoint-old").mkdir()
    (tmp_path / "checkpoint-4").symlink_to(tmp_path / "checkpoint-old")
    for step in (3, 4):
        save(tmp_path, step)
    names = ["checkpoint-3", "checkpoint-4", "checkpoint-old", "not-checkpoint-3-1", "not-checkpoint-4-1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "not-checkpoint-3-1" / "weights.bin").read_text() == "another program's"
    assert (tmp_path / "not-checkpoint-4-1").is_symlink()
    assert all(verify(tmp_path / f"checkpoint-{step}") is None for step in (3, 4))
    assert (tmp_path / "checkpoint-4" / "own.safetensors").stat().st_mode & 0o077 == 0o044
    assert sum("checkpoint:" not in message for message in messages) == 3


def test_an_earlier_versions_checkpoint_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "state.json").write_text('{"progress": {}, "fingerprint": {}}')
    with pytest.raises(ValueError, match=r"got that of an earlier version: its files can run code.*HINT: end that run"):
        read_state(tmp_path)
    for text in ("[1]", "3", "{", "[" * 100_000, '{"format": "another"}'):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(ValueError, match=r"must (be JSON|have the format).*HINT"):
            read_state(tmp_path)


def test_tensors_come_back_bit_by_bit_and_what_is_no_such_file_is_refused(tmp_path):
    made = {
        "a": torch.randn(3, 5, dtype=torch.float64),
        "b": torch.randn(4, 4).t(),
        "bool": torch.tensor([True, False, True]),
        "half": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
        "long": torch.arange(3),
        "minus": torch.tensor([-0.0, float("nan")]),
    }
    written = write_tensors(tmp_path / "x.safetensors", made)
    content = (tmp_path / "x.safetensors").read_bytes()
    assert written == (len(content), hashlib.sha256(content).hexdigest())
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == made.keys()
    for name, value in made.items():
        assert read[name].dtype == value.dtype
        assert read[name].shape == value.shape
        assert read[name].numpy(force=True).tobytes() == value.numpy().tobytes() if name != "half" else True
    assert torch.equal(read["half"], made["half"])
    torch.save(made, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="must be a safetensors file"), open_tensors(tmp_path / "y.safetensors"):
        pass
    with pytest.raises(ValueError, match="must be a safetensors file"), open_tensors(tmp_path / "none"):
        pass
