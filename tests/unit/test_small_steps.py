"""What a step costs beside its model: its log in one write, its seeds, the rate that the bar tells."""

import random
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from ds_wsi.engines.accelerator.scope import known_absent
from ds_wsi.runtime import progress
from ds_wsi.runtime.seeding import keyed_generators, seed_step, step_seed
from ds_wsi.training.step_log import StepLog
from launch.benchmarks import small_steps


def fake_run(writer, *, main=True):
    trackers = [SimpleNamespace(tracker=writer)]
    return SimpleNamespace(accelerator=SimpleNamespace(is_main_process=main, trackers=trackers))


def test_the_log_holds_every_step_with_its_number_after_an_error_too(tmp_path):
    writer = SummaryWriter(str(tmp_path))

    def fail_after_seven_steps():
        with StepLog(fake_run(writer)) as log:
            for number in range(1, 8):
                log.add(number, {"train/loss": 1 / number, **({"odd": 1.0} if number % 2 else {})})
            raise KeyError

    with pytest.raises(KeyError):
        fail_after_seven_steps()
    with StepLog(fake_run(None, main=False)) as log:
        log.add(1, {"train/loss": 1.0})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [(event.step, event.value) for event in losses] == [(n, pytest.approx(1 / n)) for n in range(1, 8)]
    assert [event.step for event in events.Scalars("odd")] == [1, 3, 5, 7]
    moments = [event.wall_time for event in losses]
    assert moments == sorted(moments)
    assert len(set(moments)) > 1  # when they came, not when they were written


def test_steps_are_on_the_disk_within_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr("ds_wsi.training.step_log.EVERY_S", 0.0)
    with StepLog(fake_run(SummaryWriter(str(tmp_path)))) as log:
        log.add(1, {"train/loss": 1.0})
        events = EventAccumulator(str(tmp_path))
        events.Reload()
        assert [event.step for event in events.Scalars("train/loss")] == [1]


def test_a_step_is_seeded_as_torch_seeds():
    seed_step(3, 7, 1)
    drawn = torch.rand(5), random.random(), np.random.rand()
    seed = step_seed(3, 7, 1)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    assert torch.equal(drawn[0], torch.rand(5))
    assert drawn[1:] == (random.random(), np.random.rand())
    with keyed_generators(11, torch.device("cpu")):
        inside = torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(inside, torch.rand(3))


def test_a_package_that_is_not_there_is_known_absent_inside_alone():
    with known_absent("no_such_package"), known_absent("json"):
        assert sys.modules["no_such_package"] is None
        assert find_spec("no_such_package") is None
        assert find_spec("json") is not None
    assert "no_such_package" not in sys.modules
    assert "json" in sys.modules


def test_the_present_rate_is_of_the_last_half_minute(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    rate, steps = progress.PresentRate(), []
    for index in range(100):
        now = 1.5 * index
        steps.append((now, 10 + index))
        kept = [step for step in steps if now - step[0] <= 31.5][-21 if index >= 20 else 0 :]
        expected = sum(amount for _, amount in kept[1:]) / (now - kept[0][0]) if index else 0.0
        assert rate.after(10 + index) == pytest.approx(expected, rel=0.06)


def test_the_benchmark_times_from_an_epochs_first_step_to_its_last(monkeypatch):
    clock = small_steps.Clock(4)
    times = iter([0.0, 3.0, 10.0, 16.0])
    monkeypatch.setattr(small_steps, "_processor_s", lambda: next(times))
    for _ in range(8):
        clock.step()
    assert [epoch.processor_s for epoch in clock.epochs] == [1.0, 2.0]


@pytest.mark.parametrize("case", small_steps.CASES, ids=["abmil", "free"])
def test_the_bare_loop_has_the_runs_model(case):
    timed = {"TimedABMIL": small_steps.TimedABMIL, "TimedFree": small_steps.TimedFree}[case.aggregator.split(":")[1]]
    count = sum(value.numel() for value in timed(small_steps.WIDTH, 2).parameters())
    assert count == sum(value.numel() for value in case.plain().parameters())
    assert Path(small_steps.__file__).stem == case.aggregator.split(":")[0].split(".")[-1]
