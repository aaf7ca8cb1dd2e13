import hashlib
import json
import logging
from pathlib import Path

import pytest

from ds_wsi.runtime.log import logger
from ds_wsi.training.checkpoint import (
    FILE_LIST,
    find_checkpoint,
    list_checkpoints,
    remove_checkpoint,
    save_checkpoint,
    seal,
    verify,
)


def write_checkpoint(folder):
    (folder / "shards").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 16)
    (folder / "shards" / "rank_0.pt").write_bytes(b"optimizer" * 100)
    (folder / "state.json").write_text('{"step": 7}')
    (folder / "empty").touch()
    seal(folder)
    return folder


def flip_byte(path, place=100):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.fixture
def messages():
    """What the package logs; its logger may not propagate, so that caplog would miss it."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def run(tmp_path):
    for step in (5, 10, 100):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    return tmp_path


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


def test_any_flipped_byte_of_the_list_is_noticed(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint-1")
    content = (folder / FILE_LIST).read_bytes()
    for place in range(len(content)):
        if content[place : place + 1].isspace():
            continue
        (folder / FILE_LIST).write_bytes(content)
        flip_byte(folder / FILE_LIST, place)
        assert verify(folder) is not None, place


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


def test_a_folder_without_a_list_is_not_deleted(run):
    (run / "checkpoint-5" / FILE_LIST).write_text("[")
    before = sorted(path.name for path in (run / "checkpoint-5").iterdir())
    remove_checkpoint(run / "checkpoint-5")
    assert sorted(path.name for path in (run / "checkpoint-5").iterdir()) == before


class OneProcess:
    """What `save_checkpoint` needs of an Accelerator."""

    is_main_process = True

    def wait_for_everyone(self):
        """One process waits for nobody."""

    def save_state(self, folder):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "model.bin").write_bytes(b"model")
        (Path(folder) / "model.bin").chmod(0o600)


def test_saving_deletes_only_checkpoints_that_were_written_here(tmp_path, messages):
    for step in (1, 2):
        save_checkpoint(OneProcess(), tmp_path, step, {}, 2)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "weights.bin").write_text("another program's")
    (tmp_path / "checkpoint-old").mkdir()
    (tmp_path / "checkpoint-4").symlink_to(tmp_path / "checkpoint-old")
    for step in (3, 4):
        save_checkpoint(OneProcess(), tmp_path, step, {}, 2)
    names = ["checkpoint-3", "checkpoint-4", "checkpoint-old", "not-checkpoint-3-1", "not-checkpoint-4-1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "not-checkpoint-3-1" / "weights.bin").read_text() == "another program's"
    assert (tmp_path / "not-checkpoint-4-1").is_symlink()
    assert all(verify(tmp_path / f"checkpoint-{step}") is None for step in (3, 4))
    assert (tmp_path / "checkpoint-4" / "model.bin").stat().st_mode & 0o077 == 0o044
    assert len(messages) == 3
