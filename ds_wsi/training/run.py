"""A run: what is fixed of it, and what advances."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ds_wsi.bags.bag import FailureLog
from ds_wsi.training.context import RunContext
from ds_wsi.training.optim import WeightAverage
from ds_wsi.training.saver import Saver


@dataclass
class Progress:
    """Where a run stands: all of it is in the checkpoint's state.json.

    `loop` ends steps and epochs. `validation` sets `pending` and `best_epoch`, and fills in the last entry of the
    history. `resume` puts back what a checkpoint holds. Nothing else sets any of it.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    global_step: int = 0
    loss_sum: float = 0.0
    bags_seen: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None
    pending: bool = False  # the last finished epoch is not validated yet
    distill_sum: float = 0.0  # of the epoch's bags, of their distance from a teacher's features
    distill_bags: int = 0
    skipped_steps: int = 0  # in which half precision overflowed, and nothing was changed

    def end_step(self, loss: float, n_bags: int, *, skipped: bool) -> None:
        """Count a step.

        Args:
            loss: the sum of its bags' losses; where it is not finite, the epoch's mean is without it.
            n_bags: the step's bags, over all ranks; of another task what its loss is divided by.
            skipped: whether it changed nothing.
        """
        self.global_step += 1
        self.step_in_epoch += 1
        self.skipped_steps += skipped
        if math.isfinite(loss):
            self.loss_sum += loss
            self.bags_seen += n_bags

    def end_distilled(self, distilled: float, n_bags: int) -> None:
        """Count a step's distance from a teacher's features, the sum over its bags."""
        if math.isfinite(distilled):
            self.distill_sum += distilled
            self.distill_bags += n_bags

    def end_epoch(self, entry: dict[str, float]) -> None:
        """Record an epoch, which is not validated yet, and go on to the next."""
        self.history.append(entry)
        self.epoch += 1
        self.step_in_epoch = 0
        self.loss_sum, self.bags_seen = 0.0, 0
        self.distill_sum, self.distill_bags = 0.0, 0

    def put_back(self, state: Mapping[str, Any]) -> None:
        """Stand where a checkpoint's run stood.

        Raises:
            KeyError: the state lacks a field; nothing is changed.
        """
        state = {"distill_sum": 0.0, "distill_bags": 0, **state}  # of a version without teachers
        values = {entry.name: state[entry.name] for entry in fields(self)}
        vars(self).update(values)


@dataclass
class Clock:
    """The time of a run, in seconds, over all its starts; moments are of `time.perf_counter`.

    `loop` sets when this start began, and the times of an epoch; `screen` what it told; `resume` what earlier starts
    took, and when a checkpoint was written. Nothing else sets any of it.

    Attributes:
        started: when this start began.
        seconds_before: what earlier starts took, up to the checkpoint of each.
        starts: how many there were, with this one.
        saved: when the last checkpoint was written; before the first one, when the run was prepared.
        epoch_seconds: how long the last epoch trained, in this start.
        epoch_waited: how much of that this rank waited for tiles.
        told_of_waiting: whether the remedy for that was told.
    """

    started: float = field(default_factory=time.perf_counter)
    seconds_before: float = 0.0
    starts: int = 1
    saved: float = field(default_factory=time.perf_counter)
    epoch_seconds: float | None = None
    epoch_waited: float = 0.0
    told_of_waiting: bool = False

    @property
    def share_waited(self) -> float:
        """How much of the last epoch waited for tiles on this rank, 0 to 1."""
        return self.epoch_waited / max(self.epoch_seconds or 0.0, 1e-9)

    @property
    def seconds(self) -> float:
        """The time of all starts together, until now."""
        return self.seconds_before + time.perf_counter() - self.started


@dataclass(frozen=True, eq=False)
class Run(RunContext):
    """A run that trains: its context, and beside it what advances, each part by what its docstring names.

    Attributes:
        failures: the tiles that could not be read; reading adds to them, and `outcome.share_failures`.
        average: the moving average of the weights, which a step moves on, or None.
        saver: the checkpoints on their way to the disk, which `resume.save` gives it.
        progress: where the run stands.
        clock: the run's time.
    """

    failures: FailureLog = field(kw_only=True)
    average: WeightAverage | None = field(kw_only=True)
    saver: Saver = field(kw_only=True)
    progress: Progress = field(kw_only=True, default_factory=Progress)
    clock: Clock = field(kw_only=True, default_factory=Clock)
