"""The next step's bags are read while the device computes, and the run is the same."""

import json

import pytest

from ds_wsi.cli import main
from ds_wsi.engines.accelerator.engine import Accelerator
from ds_wsi.training import loop, step_reader

STEPS, EPOCHS = 4, 2


def train(manifest, folder, tiles_dir, *more):
    options = {"manifest": manifest, "tiles_dir": tiles_dir, "output_dir": folder, "tile_size_px": 64}
    options |= {"encoder": "resnet10t", "num_train_epochs": EPOCHS, "dataloader_num_workers": 0}
    options |= {"tiles_per_slide": 4, "eval_tiles": 4}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert main(["train", *given, *more]) == 0


@pytest.fixture
def events(monkeypatch):
    """What happens in training, in order: a bag is read, a backward is queued, totals are read."""
    order = []
    read, backward, reduce, ahead = step_reader.read_bags, Accelerator.backward, Accelerator.reduce, loop.StepReader

    def reading(*arguments, **more):
        for bag in read(*arguments, **more):
            order.append("read")
            yield bag

    class Ahead(ahead):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            assert not self.reads_ahead  # on a CPU
            self.reads_ahead = True

    monkeypatch.setattr(step_reader, "read_bags", reading)
    monkeypatch.setattr(loop, "StepReader", Ahead)
    monkeypatch.setattr(Accelerator, "backward", lambda *given: order.append("backward") or backward(*given))
    monkeypatch.setattr(Accelerator, "reduce", lambda *given: order.append("totals") or reduce(*given))
    return order


def test_the_next_bags_are_read_before_the_totals_are_and_the_run_is_the_same(
    demo_manifest, tmp_path, request, monkeypatch
):
    options = ("--dropout", "0.2", "--save_steps", "3")
    train(demo_manifest, tmp_path / "after", tmp_path / "tiles", *options)
    events = request.getfixturevalue("events")
    train(demo_manifest, tmp_path / "ahead", tmp_path / "tiles", *options)
    a_step = ["backward", "read", "totals"]
    # The last is no step's: whether any rank was asked to end.
    assert events == [*["read", *a_step * (STEPS - 1), "backward", "totals"] * EPOCHS, "totals"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("after", "ahead")]
    assert weights[0] == weights[1]
    losses = [
        [entry["train_loss"] for entry in json.loads((tmp_path / name / "history.json").read_text())]
        for name in ("after", "ahead")
    ]
    assert losses[0] == losses[1]


def test_a_run_that_was_stopped_after_a_bag_was_read_ahead_reads_it_again(demo_manifest, tmp_path, events, monkeypatch):
    options = ("--dropout", "0.2", "--save_steps", "1", "--num_train_epochs", "1")
    train(demo_manifest, tmp_path / "whole", tmp_path / "tiles", *options)
    save = loop.save

    def stop(run):
        save(run)
        if run.progress.global_step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        train(demo_manifest, tmp_path / "stopped", tmp_path / "tiles", *options)
    monkeypatch.setattr(loop, "save", save)
    train(demo_manifest, tmp_path / "stopped", tmp_path / "tiles", *options, "--resume_from_checkpoint")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]
