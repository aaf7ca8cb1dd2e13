"""Checkpoints are written beside training: what waits, what is told, and what a failure leaves."""

import errno
import os
import re
import shutil
import threading
import time

import pytest
import torch
from checkpoint_cases import OneProcess, save, save_one
from logs import logged
from safetensors.torch import load_file

from ds_wsi.runtime.files import write_json
from ds_wsi.runtime.tensor_file import write_tensors
from ds_wsi.training import checkpoint
from ds_wsi.training import saver as saver_module
from ds_wsi.training.checkpoint import Contents, list_checkpoints, save_checkpoint, verify
from ds_wsi.training.saver import Saver


@pytest.fixture
def messages():
    with logged() as records:
        yield records


def test_the_step_goes_on_while_the_disk_is_slow_and_a_third_waits(tmp_path, messages, monkeypatch):
    may_write, begun = threading.Event(), []

    def slow(path, tensors):
        begun.append(path.parent.name)
        assert may_write.wait(20)
        return write_tensors(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    weights = torch.zeros(4)
    with Saver() as saver:
        for step in (1, 2):
            saver.make_room()
            contents = Contents({}, {"model.safetensors": {"w": weights.clone()}}, {})
            save_checkpoint(saver, OneProcess(), tmp_path, step, contents, 9)
            weights += 1  # training goes on
        third = threading.Thread(target=saver.make_room)
        third.start()
        third.join(0.3)
        assert third.is_alive(), "two are on the way, a third waits"
        assert not list_checkpoints(tmp_path)
        may_write.set()
        third.join(20)
        assert not third.is_alive()
    assert begun == ["checkpoint-1", "checkpoint-2"]
    for step in (1, 2):
        assert load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")["w"].tolist() == [step - 1.0] * 4
        assert verify(tmp_path / f"checkpoint-{step}") is None
    assert re.search(r"checkpoint: .*-1 \(waited \d+\.\d\d s, written in \d+\.\d\d s beside training\)", messages[0])


def test_a_disk_that_does_not_answer_is_not_waited_for_in_silence(monkeypatch, messages):
    """Neither where there is no room for another copy, nor at the end."""
    monkeypatch.setattr(saver_module, "TELL_S", 0.05)
    answers = threading.Event()
    told = lambda: [line for line in messages if "is waited for" in line]  # noqa: E731

    def answer_when_told(already):
        while len(told()) <= already:
            time.sleep(0.01)
        answers.set()

    for wait in ("make_room", "close"):
        answers.clear()
        already = len(told())
        saver = Saver()
        for step in range(2):
            saver.make_room()
            saver.give(f"checkpoint-{step}", answers.wait)
        threading.Thread(target=answer_when_told, args=(already,)).start()
        getattr(saver, wait)()
        saver.close()
        assert re.search(r"checkpoint-0 has been written for \d+ s.*HINT: check the disk", told()[already])


@pytest.mark.parametrize("beside", [True, False])
def test_a_failed_write_stops_the_next_step_and_leaves_no_half(tmp_path, monkeypatch, beside):
    save(tmp_path, 1)

    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "write_tensors", full)

    def steps():
        with Saver(beside) as saver:
            save_one(saver, tmp_path, 2)
            for _ in range(1000):
                saver.check()
                time.sleep(0.01)
        pytest.fail("no step was stopped")

    with pytest.raises(OSError, match="No space left on device") as failed:
        steps()
    assert failed.value.__notes__ == ["checkpoint-2"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_failure_at_the_end_is_raised_and_one_beside_an_error_is_told(tmp_path, monkeypatch, messages):
    def full(path, tensors):
        raise OSError("full")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(OSError, match="full"):
        save(tmp_path, 1)

    def interrupted():
        with Saver() as saver:
            save_one(saver, tmp_path, 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert messages == ["a checkpoint was not written: full"]
    assert not list(tmp_path.iterdir())


def test_a_part_of_another_process_is_waited_for_and_its_failure_told(tmp_path):
    def waits(answer, seconds=20.0, ending=False):
        part = tmp_path / "part-00001.json"
        part.unlink(missing_ok=True)
        event = threading.Event()
        if ending:
            event.set()
        timer = threading.Timer(0.1, lambda: write_json(part, answer)) if answer else None
        if timer:
            timer.start()
        return checkpoint._await_part(tmp_path / "checkpoint-1", 1, saver_module.Patience(seconds, event))

    files = waits({"files": {"b": {"bytes": 3, "sha256": "x"}}})
    assert files["b"].bytes == 3
    with pytest.raises(RuntimeError, match="rank 1 could not write its part of checkpoint-1: OSError: full"):
        waits({"failed": "OSError: full"})
    with pytest.raises(RuntimeError, match=r"got none of rank 1 in time .*HINT"):
        waits(None, seconds=0.2)
    saver_module.GRACE_S, before = 0.1, saver_module.GRACE_S
    try:
        with pytest.raises(RuntimeError, match="got none of rank 1"):
            waits(None, ending=True)
    finally:
        saver_module.GRACE_S = before


def test_the_folder_may_be_gone_when_the_last_part_is_told(tmp_path, monkeypatch):
    """The main process renames and removes as soon as it reads the message."""
    temporary = tmp_path / "folder" / "checkpoint-1"
    temporary.mkdir(parents=True)
    real = os.replace

    def replace(source, target):
        real(source, target)
        shutil.rmtree(tmp_path / "folder")

    monkeypatch.setattr(os, "replace", replace)
    checkpoint._write_part(temporary, 1, {"own.safetensors": {"x": torch.ones(2)}})
    assert not (tmp_path / "folder").exists()
