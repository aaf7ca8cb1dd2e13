"""A step trains on the bags that were planned for it: one pass over the plan says what is read and what is taken."""

import re
import time
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ds_wsi.bags.bag import Bag
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.bags.slide_entry import SlideEntry
from ds_wsi.bags.step_layout import StepLayout
from ds_wsi.bags.tile_budget import TileBudget
from ds_wsi.runtime.log import logger
from ds_wsi.tile_parallel import TileMesh
from ds_wsi.training import step_reader
from ds_wsi.training.epoch_plan import planned_steps
from ds_wsi.training.run import Clock, Progress
from ds_wsi.training.screen import epoch_line, warn_of_waiting
from ds_wsi.training.settings import TrainSettings
from ds_wsi.training.step_reader import StepReader
from tests.unit.tiny_runs import train, write_cohort

N_SLIDES, EPOCHS = 5, 2
LAYOUT = StepLayout(bags_per_group=1, micro_steps=2)  # an epoch of three steps, the last of one bag
STEPS = 3


def make_run(device="cpu"):
    """What a reader asks of its run: five slides of four tiles."""
    slides = [SlideEntry(f"S-{row}", Path("x"), 0, "p") for row in range(N_SLIDES)]
    lengths, grids = [4] * N_SLIDES, [range(4)] * N_SLIDES
    return SimpleNamespace(
        settings=TrainSettings(),
        config=SimpleNamespace(norm_training="bag"),
        cohort=SimpleNamespace(
            manifest=SimpleNamespace(slides=slides),
            rows=lambda split: list(range(N_SLIDES)),
            lengths=lengths,
            grids=grids,
        ),
        tile_budget=TileBudget(),
        mesh=TileMesh(),
        device=torch.device(device),
        step_layout=LAYOUT,
        seed=0,
        epochs=EPOCHS,
        reading=ReadPolicy(0),
        training_tiles=[4] * N_SLIDES,
        stacks=SimpleNamespace(lays_anew=False),
        reads_host_tiles=False,
    )


def read(parts):
    """A bag for each part."""
    for part in parts:
        yield Bag(part.slide, torch.zeros(part.stop - part.start, 2), torch.arange(part.start, part.stop))


def swapped(bags):
    """The third and the fourth bag in each other's place."""
    first = [next(bags) for _ in range(4)]
    return chain(first[:2], first[:1:-1], bags)


def reader(progress=None, *, read=read, run=None):
    run = run or make_run()
    return StepReader(run, planned_steps(run, progress or Progress()), read)


def slides_of(steps, epoch):
    """Per step and micro-step, the slides that were planned, and those that were read."""
    return [
        (
            [[part.slide for part in parts] for parts in step.parts],
            [[bag.slide for bag in micro.bags] for micro in micro_steps],
        )
        for step, micro_steps in steps.of_epoch(epoch)
    ]


def test_each_step_has_the_bags_of_its_plan():
    steps = reader()
    by_epoch = [slides_of(steps, epoch) for epoch in range(EPOCHS)]
    for epoch in by_epoch:
        assert len(epoch) == STEPS
        assert all(planned == read for planned, read in epoch)
        assert sorted(slide for _, read in epoch for bags in read for slide in bags) == list(range(N_SLIDES))
    assert by_epoch[0] != by_epoch[1]  # an order of its own
    assert list(steps.of_epoch(EPOCHS)) == []


@pytest.mark.parametrize("done", range(STEPS + 1))
def test_a_run_that_goes_on_takes_the_steps_that_are_left(done):
    """Stopped after an epoch's last step, none of that epoch."""
    whole = reader()
    expected = [slides_of(whole, epoch) for epoch in range(EPOCHS)]
    rest = reader(Progress(step_in_epoch=done, global_step=done))
    assert slides_of(rest, 0) == expected[0][done:]
    numbers = []
    for step, micro_steps in rest.of_epoch(1):
        numbers.append((step.epoch, step.number))
        list(micro_steps)
    assert numbers == [(1, STEPS), (1, STEPS + 1), (1, STEPS + 2)]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda parts: swapped(read(parts)), r"slide S-\d, got slide S-\d \(epoch 1, step 1\)"),
        (lambda parts: islice(read(parts), 2), r"slide S-\d, got no bag \(epoch 1, step 1\)"),
    ],
)
def test_a_reader_that_yields_another_slide_is_refused_with_slide_and_step(wrong, words):
    steps = reader(read=wrong).of_epoch(0)
    _, micro_steps = next(steps)
    assert [[bag.slide for bag in micro.bags] for micro in micro_steps] == slides_of(reader(), 0)[0][0]
    _, micro_steps = next(steps)
    with pytest.raises(RuntimeError, match=rf"must train on the bags that were planned for it, {words}.*HINT"):
        list(micro_steps)


def test_a_step_whose_bags_were_left_is_noticed_by_the_next_one():
    steps = reader().of_epoch(0)
    next(next(steps)[1])
    _, micro_steps = next(steps)
    with pytest.raises(RuntimeError, match=r"epoch 1, step 1"):
        list(micro_steps)


def test_on_a_device_the_next_step_of_the_epoch_is_read_ahead_and_no_more(monkeypatch):
    asked = []

    def noting(parts):
        for bag in read(parts):
            asked.append(bag.slide)
            yield bag

    steps = reader(run=make_run("cuda"), read=noting)
    monkeypatch.setattr(step_reader, "lay_bags", lambda run, bags, step: SimpleNamespace(bags=bags, step=step))
    counts, slides = [], []
    for epoch in range(EPOCHS):
        for step, micro_steps in steps.of_epoch(epoch):
            for micro in micro_steps:
                assert micro.step == step.number
                slides += [bag.slide for bag in micro.bags]
            steps.make_ready()
            counts.append(len(asked) - len(slides))
    assert counts == [1, 1, 0] * EPOCHS  # after an epoch's last step, which is validated first, nothing
    assert slides == asked


def test_a_run_whose_bags_come_in_another_order_ends_with_slide_and_step(tmp_path, monkeypatch, capsys):
    right = step_reader.read_bags
    monkeypatch.setattr(step_reader, "read_bags", lambda *given, **more: swapped(right(*given, **more)))
    folder = write_cohort(tmp_path / "c")
    assert train(folder, folder / "run", epochs=1) == 2
    assert re.search(r"planned for it, slide s\d\d, got slide s\d\d \(epoch 1, step 2\)", capsys.readouterr().err)
    assert not list((folder / "run").glob("checkpoint-*"))


def slowly(parts):
    for bag in read(parts):
        time.sleep(0.02)
        yield bag


def test_what_steps_wait_for_bags_is_measured():
    steps = reader(read=slowly)
    assert steps.waited == 0
    began = time.perf_counter()
    for _, micro_steps in steps.of_epoch(0):
        list(micro_steps)
        time.sleep(0.1)
    assert N_SLIDES * 0.02 <= steps.waited < time.perf_counter() - began - STEPS * 0.1


def ended_epoch(seconds, waited, **reading):
    """A run whose first epoch has ended."""
    return SimpleNamespace(
        clock=Clock(epoch_seconds=seconds, epoch_waited=waited),
        settings=SimpleNamespace(policies=SimpleNamespace(reading=ReadPolicy(2, **reading))),
        cohort=SimpleNamespace(in_dim=None),
        progress=Progress(epoch=0),
        accelerator=SimpleNamespace(process_index=1),
        best_metric="eval_auc",
        epochs=3,
    )


def test_the_remedy_of_waiting_is_told_once(caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    for run in (ended_epoch(100, 9), ended_epoch(20, 15)):  # little, and of a short epoch
        warn_of_waiting(run)
    assert not caplog.records
    run = ended_epoch(100, 34)
    for _ in range(2):
        warn_of_waiting(run)
    (record,) = caplog.records
    assert record.getMessage() == (
        "training must not wait for tiles for more than 10% of its time, got 34% of epoch 1's 2 min on rank 1. "
        "HINT: --dataloader_num_workers 4, where there are cores for them; or tiles that are decoded once: ds-wsi tile "
        "--store DIR, then --tile_store DIR."
    )
    assert "data wait 34%" in epoch_line(run, {"epoch": 1, "train_loss": 0.5}, chosen=False)
    warn_of_waiting(ended_epoch(100, 34, tile_store="store"))
    assert "tile --store" not in caplog.records[-1].getMessage()
