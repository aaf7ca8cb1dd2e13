"""One optimizer step of a run: its micro-steps, its totals over all ranks, and what was not finite."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import torch

from ds_wsi.engines.accelerator.engine import gather_object
from ds_wsi.runtime.seeding import seed_step, step_seed
from ds_wsi.training.cox_pass import LossOf, cox_losses
from ds_wsi.training.epoch_plan import PlannedStep, planned_steps
from ds_wsi.training.finite import (
    BagsAndLosses,
    skips_overflow,
    tell_not_finite,
    weights_are_finite,
    weights_seem_finite,
)
from ds_wsi.training.micro_loss import Computed, StepUnits, distillation_weight, step_units, step_weight
from ds_wsi.training.micro_loss import micro_loss as _micro_loss
from ds_wsi.training.micro_step import MicroStep
from ds_wsi.training.out_of_memory import naming_no_memory, with_retry
from ds_wsi.training.run import Run
from ds_wsi.training.step import run_micro_step
from ds_wsi.training.step_reader import StepReader, read_parts
from ds_wsi.training.stops import wants_to_stop
from ds_wsi.training.warmup import set_rates


class StepTotals(NamedTuple):
    """What a step came to, the same on all ranks.

    Attributes:
        loss: the sum of its bags' losses; of cox the loss times the events.
        units: what that is divided by: bags, or labelled units of another task.
        distilled: the sum of its bags' distances from a teacher's features; 0 without one.
        n_tiles: how many tiles it trained on.
        save_is_due: whether a checkpoint is, by the time since the last one, as the main process has it.
        stop_is_due: whether a rank was asked to end, or the time is over.
    """

    loss: float
    units: int
    distilled: float
    n_tiles: int
    save_is_due: bool
    stop_is_due: bool


def train_step(
    run: Run,
    step: PlannedStep,
    micro_steps: Iterator[MicroStep],
    learning_rate: float,
    meanwhile: Callable[[], None],
) -> StepTotals:
    """Take one optimizer step. Collective.

    Args:
        run: the run that takes it.
        step: the step as it was planned.
        micro_steps: the step's bags, read as they are taken.
        learning_rate: the step's.
        meanwhile: called once all work is queued, while the device computes it.
    """
    accelerator = run.accelerator
    set_rates(
        run.optimizer,
        learning_rate,
        run.settings.optim.weight_decay,
        resting=run.module.warming_up,
        encoder_factor=run.settings.encoder_factor,
    )
    seed_step(run.seed, step.number, accelerator.process_index)
    alone = len(step.parts) == 1 and accelerator.num_processes == 1 and not run.has_own_engine
    loss_sum, distilled, tiles = torch.zeros((), device=run.device), torch.zeros((), device=run.device), 0
    seen: list[BagsAndLosses] = []
    units = step_units(run, step)
    weights, again = _weights(run, step, units.total), partial(_start_again, run, step) if alone else None
    for index, (bags, loss_of) in enumerate(_losses(run, step, micro_steps, units)):
        _key_sharing(run, step, index)
        done = _micro_step(run, bags, weights, again, loss_of)
        loss_sum += done.loss if done.told is None else done.told
        distilled += 0.0 if done.distilled is None else done.distilled
        tiles += done.n_tiles
        seen.append(done.seen)
    if run.average is not None:
        run.average.update(run.module)
    meanwhile()
    return _totals(run, step, units.total, torch.stack([loss_sum, distilled]), tiles, seen)


def _totals(
    run: Run, step: PlannedStep, units: int, loss_sums: torch.Tensor, tiles: int, seen: Sequence[BagsAndLosses]
) -> StepTotals:
    """The totals over all ranks, in one all-reduce; loss and weights that are not finite are refused."""
    accelerator = run.accelerator
    waited = time.perf_counter() - run.clock.saved
    due = 0 < 60 * run.settings.run.save_minutes <= waited
    told = [float(tiles), float(accelerator.is_main_process and due), float(wants_to_stop(run))]
    bad = ~weights_seem_finite(run.module, run.device)
    totals = accelerator.reduce(torch.cat([loss_sums, torch.tensor(told, device=run.device), bad[None]]), "sum")
    loss, distilled, n_tiles, *flags = totals.tolist()
    save_is_due, stop_is_due, bad_weights = (flag > 0 for flag in flags)
    bad_weights = bad_weights and not all(gather_object([weights_are_finite(run.module)]))
    left_out = not math.isfinite(loss) or accelerator.optimizer_step_was_skipped
    if bad_weights or (left_out and not skips_overflow(run)):
        tell_not_finite(run, step.number, seen, loss_is_finite=math.isfinite(loss))
    each = run.mesh.tile_size
    return StepTotals(loss / each, units, distilled / each, int(n_tiles), save_is_due, stop_is_due)


def _losses(
    run: Run, step: PlannedStep, micro_steps: Iterator[MicroStep], units: StepUnits
) -> Iterator[tuple[MicroStep, LossOf]]:
    """The step's micro-steps, each with what computes its loss."""
    if run.task is not None and run.task.couples:
        return cox_losses(run, step, micro_steps, partial(_key_sharing, run, step))
    loss_of = partial(_micro_loss, factors=units.factors)
    return ((bags, loss_of) for bags in micro_steps)


def _key_sharing(run: Run, step: PlannedStep, index: int) -> None:
    """Say what an aggregator whose bags lie on several ranks draws by in this micro-step."""
    if run.sharing.forward is not None:
        key = index * run.mesh.slide_size + run.mesh.slide_rank
        run.sharing.forward.seed = step_seed(run.seed, step.number, key)


class Weights(NamedTuple):
    """Factors of a micro-step's loss, and of what it `distilled`, None without a teacher."""

    loss: float
    distilled: float | None


def _weights(run: Run, step: PlannedStep, units: int) -> Weights:
    return Weights(step_weight(run, step, units), None if run.teacher is None else distillation_weight(run, step))


def _micro_step(
    run: Run, step: MicroStep, weights: Weights, again: Callable[[], None] | None, loss_of: LossOf
) -> Computed:
    """Take a micro-step; `again` undoes a first try that ran out of memory."""
    computed: list[Computed] = []

    def compute() -> torch.Tensor:
        computed[:] = [loss_of(run, step)]
        loss, distilled = computed[0].loss * weights.loss, computed[0].distilled
        if distilled is None or weights.distilled is None:
            return loss
        return loss + distilled * weights.distilled

    # What is not the guard's is the optimizer's: Adam makes its moments in the first step.
    with naming_no_memory("the optimizer's step", run.module.encoder, run.device):
        run_micro_step(
            run.accelerator,
            run.model,
            run.optimizer,
            compute,
            1.0,  # in the sum already
            max_grad_norm=run.settings.optim.max_grad_norm,
            guard=lambda tried: with_retry(tried, run.module, run.module.encoder, run.device, again=again),
        )
    run.stacks.used()
    loss, distilled = computed[0].loss.detach(), computed[0].distilled
    return computed[0]._replace(loss=loss, distilled=None if distilled is None else distilled.detach())


def _start_again(run: Run, step: PlannedStep) -> None:
    """Undo what a step's first try drew and summed."""
    run.optimizer.zero_grad()
    seed_step(run.seed, step.number, run.accelerator.process_index)


class TimedSteps(NamedTuple):
    """Two micro-steps that were timed on this process.

    Attributes:
        read_s, compute_s: seconds of each.
        tiles: how many each had; 0 where the process had no bag.
    """

    read_s: tuple[float, ...]
    compute_s: tuple[float, ...]
    tiles: tuple[int, ...]


def time_micro_steps(run: Run) -> TimedSteps:
    """Take two micro-steps of the first epoch and time them, reading (in this process) apart from computing.

    For a dry run: the weights, and the engine's count of micro-steps, are changed. Collective.
    """
    steps = StepReader(run, iter(_two_micro_steps(run)), read_parts(run, replace(run.reading, workers=0)))
    run.model.train()
    read_s, compute_s, tiles = [], [], []
    for step, micro_steps in steps.of_epoch(0):
        started = time.perf_counter()
        (bags,) = micro_steps
        read = time.perf_counter()
        units = step_units(run, step)
        ((bags, loss_of),) = _losses(run, step, iter((bags,)), units)
        done = _micro_step(run, bags, _weights(run, step, units.total), None, loss_of)
        done.loss.item()  # waits for the device
        read_s.append(read - started)
        compute_s.append(time.perf_counter() - read)
        tiles.append(done.n_tiles)
    return TimedSteps(tuple(read_s), tuple(compute_s), tuple(tiles))


def _two_micro_steps(run: Run) -> list[PlannedStep]:
    """The first two micro-steps in which each group has a bag, each as a step; of a small cohort any, or one twice."""
    some: list[PlannedStep] = []
    full: list[PlannedStep] = []
    for step in takewhile(lambda step: step.epoch == 0, planned_steps(run, run.progress)):
        for parts, groups in zip(step.parts, step.plan.micro_steps, strict=True):
            (full if all(groups) else some).append(step._replace(parts=(parts,)))
        if len(full) > 1:
            break
    return ((full or some) * 2)[:2]
