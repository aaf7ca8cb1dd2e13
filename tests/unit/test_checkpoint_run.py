"""Runs whose checkpoints are written beside training, before it goes on, or not at all for want of room."""

import errno
import re
import time

import pytest
from tiny_runs import train, write_cohort

from ds_wsi.runtime.tensor_file import write_tensors
from ds_wsi.training import checkpoint, loop
from ds_wsi.training.checkpoint import list_checkpoints, verify

OPTIONS = ("--save_steps", "1", "--save_total_limit", "20", "--dropout", "0.2", "--ema_decay", "0.5")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = write_cohort(tmp_path_factory.mktemp("cohort"))
    assert train(folder, folder / "beside", *OPTIONS) == 0
    return folder


def test_before_and_beside_are_the_same_run(cohort, capsys):
    assert train(cohort, cohort / "before", *OPTIONS, "--no_save_beside") == 0
    printed = capsys.readouterr().err
    assert re.search(r"checkpoint-1 \(waited \d+\.\d\d s until it was written\)", printed)
    for name in ("model.safetensors", "predictions.csv"):
        assert (cohort / "before" / name).read_bytes() == (cohort / "beside" / name).read_bytes()
    for folder in ("before", "beside"):
        checkpoints = list_checkpoints(cohort / folder)
        assert len(checkpoints) == 12
        assert all(verify(path) is None for path in checkpoints)
    last = "checkpoint-12"
    for name in ("model", "optimizer", "weight_average", "random-00000-of-00001"):
        one, other = (cohort / folder / last / f"{name}.safetensors" for folder in ("before", "beside"))
        assert one.read_bytes() == other.read_bytes(), name


def test_a_full_disk_stops_the_next_step_and_the_run_goes_on_from_the_last_whole_one(cohort, monkeypatch, capsys):
    steps, step = [], loop.train_step

    def counted(*given):
        steps.append(1)
        run = given[0]
        while run.saver._jobs.qsize():  # a step is slower than the disk, which is slower than this one
            time.sleep(0.001)
        return step(*given)

    def filling(path, tensors):
        if path.parent.name == "checkpoint-4":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_tensors(path, tensors)

    monkeypatch.setattr(loop, "train_step", counted)
    monkeypatch.setattr(checkpoint, "write_tensors", filling)
    assert train(cohort, cohort / "full", *OPTIONS) == 2
    printed = capsys.readouterr().err
    assert "No space left on device" in printed
    assert "HINT: free space there" in printed
    assert "checkpoint-4" in printed
    assert 4 < len(steps) < 9, "stopped within a few steps, not at the end"
    assert not list((cohort / "full").glob(".ds_wsi-*"))
    assert "checkpoint-3" in [path.name for path in list_checkpoints(cohort / "full") if verify(path) is None]
    monkeypatch.undo()
    assert train(cohort, cohort / "full", *OPTIONS, "--resume_from_checkpoint") == 0
    for name in ("model.safetensors", "predictions.csv"):
        assert (cohort / "full" / name).read_bytes() == (cohort / "beside" / name).read_bytes()
