"""The folder that a run takes, and its log."""

import logging

import pytest
from tiny_runs import listing

from ds_wsi.runtime.log import logger
from ds_wsi.training.checkpoint import seal
from ds_wsi.training.run_folder import LOG, MARK, begin, is_run_folder, logging_to, require_run_folder


def test_a_new_an_empty_and_an_own_folder_are_taken(tmp_path):
    require_run_folder(tmp_path / "new" / "er", resumes=False)
    require_run_folder(tmp_path, resumes=False)
    begin(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("the user's")
    require_run_folder(tmp_path / "run", resumes=False)
    before = listing(tmp_path / "run")
    begin(tmp_path / "run")
    assert listing(tmp_path / "run") == before


@pytest.mark.parametrize(
    "name", [".env.tmpl", "tiles", "run.json", "checkpoint-old", "checkpoint-3", MARK, "protocol.json"]
)
def test_a_users_folder_is_refused_and_stays_as_it_is(tmp_path, name):
    (tmp_path / name).mkdir() if name.startswith("check") else (tmp_path / name).write_text('{"format": "theirs"}')
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=r"a run's own, got .*1 other entry \(.*HINT: give a new folder"):
        require_run_folder(tmp_path, resumes=True)
    assert listing(tmp_path) == before


def test_a_file_and_a_linked_mark_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"must be a folder, got .*file, a file"):
        require_run_folder(tmp_path / "file", resumes=False)
    begin(tmp_path / "run")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / MARK).symlink_to(tmp_path / "run" / MARK)
    assert not is_run_folder(tmp_path / "linked")


def test_a_run_of_an_earlier_version_is_known_by_its_checkpoint(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "state.json").write_text("{}")
    seal(tmp_path / "checkpoint-4")
    require_run_folder(tmp_path, resumes=True)
    with pytest.raises(ValueError, match=r"which holds checkpoint-4\. HINT: add --resume_from_checkpoint"):
        require_run_folder(tmp_path, resumes=False)


def say(folder, text):
    with logging_to(folder):
        logger.info(text)


@pytest.fixture(autouse=True)
def _at_info():
    logger.setLevel(logging.INFO)


def test_the_log_goes_on_and_says_how_a_run_ended(tmp_path):
    say(tmp_path, "first")
    say(tmp_path, "second")
    with pytest.raises(KeyboardInterrupt), logging_to(tmp_path):
        raise KeyboardInterrupt("by hand")
    logger.info("not in it")
    head, *lines = (tmp_path / LOG).read_text().splitlines()
    assert head.startswith("# ds_wsi")
    assert [line.split(": ", 1)[1] for line in lines] == ["first", "second", "ended by KeyboardInterrupt: by hand"]


@pytest.mark.parametrize("kind", ["file", "link", "dangling", "folder"])
def test_a_users_file_of_the_logs_name_is_left_alone(tmp_path, kind, caplog):
    target, log = tmp_path / "outside.log", tmp_path / "run" / LOG
    log.parent.mkdir()
    target.write_text("# ds_wsi.started: what the run said\n")
    if kind == "folder":
        log.mkdir()
    elif kind == "file":
        log.write_text("the user's\n")
    else:
        log.symlink_to(target if kind == "link" else tmp_path / "none")
    before = listing(tmp_path)
    say(tmp_path / "run", "a message")
    assert listing(tmp_path) == before
    assert "is not written" in caplog.text
