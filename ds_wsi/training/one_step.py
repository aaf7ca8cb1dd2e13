"""One optimizer step of a run: its micro-steps, its totals over all ranks, and what was not finite."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import torch

from ds_wsi.bags.bag import Bag
from ds_wsi.engines.accelerator.engine import gather_object
from ds_wsi.models.loss import stack_loss
from ds_wsi.runtime.errors import naming
from ds_wsi.runtime.seeding import seed_step, step_seed
from ds_wsi.runtime.words import counted
from ds_wsi.stacking.randomness import bag_randomness
from ds_wsi.tile_parallel.collectives import Traffic, share_numbers
from ds_wsi.training.context import RunContext
from ds_wsi.training.epoch_plan import PlannedStep, planned_steps
from ds_wsi.training.finite import (
    BagsAndLosses,
    skips_overflow,
    tell_not_finite,
    weights_are_finite,
    weights_seem_finite,
)
from ds_wsi.training.micro_step import MicroStep, on_device, stack_of
from ds_wsi.training.out_of_memory import naming_no_memory, with_retry
from ds_wsi.training.run import Run
from ds_wsi.training.step import bag_weight, blank_tile, idle_loss, run_micro_step
from ds_wsi.training.step_reader import StepReader, read_parts
from ds_wsi.training.stops import wants_to_stop
from ds_wsi.training.warmup import set_rates


class StepTotals(NamedTuple):
    """What a step came to, the same on all ranks.

    Attributes:
        loss: the sum of its bags' losses.
        n_tiles: how many tiles it trained on.
        save_is_due: whether a checkpoint is, by the time since the last one, as the main process has it.
        stop_is_due: whether a rank was asked to end, or the time is over.
    """

    loss: float
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
    accelerator, mesh = run.accelerator, run.mesh
    set_rates(
        run.optimizer,
        learning_rate,
        run.settings.optim.weight_decay,
        resting=run.module.warming_up,
        encoder_factor=run.settings.encoder_factor,
    )
    seed_step(run.seed, step.number, accelerator.process_index)
    alone = len(step.parts) == 1 and accelerator.num_processes == 1 and not run.has_own_engine
    loss_sum, tiles = torch.zeros((), device=run.device), 0
    seen: list[BagsAndLosses] = []
    for index, bags in enumerate(micro_steps):
        if run.sharing.forward is not None:
            key = index * mesh.slide_size + mesh.slide_rank
            run.sharing.forward.seed = step_seed(run.seed, step.number, key)
        done = _micro_step(run, bags, _weight(run, step), again=partial(_start_again, run, step) if alone else None)
        loss_sum += done.loss
        tiles += done.n_tiles
        seen.append(done.seen)
    if run.average is not None:
        run.average.update(run.module)
    meanwhile()
    return _totals(run, step, loss_sum, tiles, seen)


def _weight(run: RunContext, step: PlannedStep) -> float:
    # Ranks that share a bag each compute its loss: there are as many means to take as groups.
    return bag_weight(step.plan.n_bags, run.mesh.slide_size, len(step.plan.micro_steps))


def _totals(
    run: Run, step: PlannedStep, loss_sum: torch.Tensor, tiles: int, seen: Sequence[BagsAndLosses]
) -> StepTotals:
    """The totals over all ranks, in one all-reduce; loss and weights that are not finite are refused."""
    accelerator = run.accelerator
    waited = time.perf_counter() - run.clock.saved
    due = 0 < 60 * run.settings.run.save_minutes <= waited
    told = [float(tiles), float(accelerator.is_main_process and due), float(wants_to_stop(run))]
    bad = ~weights_seem_finite(run.module, run.device)
    totals = accelerator.reduce(torch.cat([loss_sum[None], torch.tensor(told, device=run.device), bad[None]]), "sum")
    loss, n_tiles, *flags = totals.tolist()
    save_is_due, stop_is_due, bad_weights = (flag > 0 for flag in flags)
    bad_weights = bad_weights and not all(gather_object([weights_are_finite(run.module)]))
    left_out = not math.isfinite(loss) or accelerator.optimizer_step_was_skipped
    if bad_weights or (left_out and not skips_overflow(run)):
        tell_not_finite(run, step.number, seen, loss_is_finite=math.isfinite(loss))
    return StepTotals(loss / run.mesh.tile_size, int(n_tiles), save_is_due, stop_is_due)


class _Computed(NamedTuple):
    """What a micro-step came to on this rank: the sum of its bags' losses, its tiles, and what it was of."""

    loss: torch.Tensor
    n_tiles: int
    seen: BagsAndLosses


def _micro_step(run: Run, step: MicroStep, weight: float, again: Callable[[], None] | None) -> _Computed:
    """Take a micro-step; `again` undoes a first try that ran out of memory."""
    computed: list[_Computed] = []

    def compute() -> torch.Tensor:
        computed[:] = [_micro_loss(run, step)]
        return computed[0].loss

    # What is not the guard's is the optimizer's: Adam makes its moments in the first step.
    with naming_no_memory("the optimizer's step", run.module.encoder, run.device):
        loss = run_micro_step(
            run.accelerator,
            run.model,
            run.optimizer,
            compute,
            weight,
            max_grad_norm=run.settings.optim.max_grad_norm,
            guard=lambda tried: with_retry(tried, run.module, run.module.encoder, run.device, again=again),
        )
    run.stacks.used()
    return computed[0]._replace(loss=loss)


def _start_again(run: Run, step: PlannedStep) -> None:
    """Undo what a step's first try drew and summed."""
    run.optimizer.zero_grad()
    seed_step(run.seed, step.number, run.accelerator.process_index)


def _micro_loss(run: Run, step: MicroStep) -> _Computed:
    _require_tiles(run, step.bags)
    if not step.bags:
        idle = BagsAndLosses((), torch.ones(0, dtype=torch.bool))
        return _Computed(idle_loss(run.model, _blank(run)), 0, idle)
    labels = on_device([run.cohort.manifest.slides[bag.slide].class_index for bag in step.bags], run.device)
    stack = stack_of(run, step)
    with bag_randomness(step.keys, part=run.mesh.tile_rank), _naming_slides(run, step):
        output = run.model(stack, labels)
    chosen = run.settings.optim.class_weights
    weights = None if chosen is None else torch.tensor(chosen, device=run.device)[labels]
    slides = tuple(run.cohort.manifest.slides[bag.slide].slide_id for bag in step.bags)
    seen = BagsAndLosses(slides, output.logits.detach().isfinite().all(-1))
    return _Computed(stack_loss(output, labels, weights), sum(map(len, step.tiles)), seen)


@contextmanager
def _naming_slides(run: Run, step: MicroStep) -> Iterator[None]:
    """Name the slides that an error is of; tell a BatchNorm's one value per channel in our words, not of tensors."""
    slides = [run.cohort.manifest.slides[bag.slide].slide_id for bag in step.bags]
    try:
        with naming(f"slides {', '.join(slides)}, step {run.progress.global_step}"):
            yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error) and "more than one value per channel" not in str(error):
            raise
        tiles = sum(map(len, step.tiles))
        raise ValueError(
            "the encoder's BatchNorm must see more than one value per channel in training, got "
            f"{counted(tiles, 'tile')} of {', '.join(slides)}. HINT: leave the slide out, or take --norm_training "
            "frozen, --bags_per_step 2, or a larger --tile_size_px."
        ) from error


def _blank(run: RunContext) -> torch.Tensor:
    """A bag of one blank instance, of what the model takes."""
    if run.cohort.in_dim is not None:
        return torch.zeros(1, run.cohort.in_dim, device=run.device)
    return blank_tile(run.settings.policies.tiling.tile_size_px, run.device)


def _require_tiles(run: Run, bags: list[Bag]) -> None:
    """Refuse, on all ranks that share it, a bag of which none could read a tile."""
    if run.mesh.tile_size == 1 or not bags:
        return
    counts = share_numbers([len(bag.tiles) for bag in bags], run.mesh.group, run.device, Traffic()).sum(0)
    for bag, count in zip(bags, counts.tolist(), strict=True):
        run.failures.require_tiles(bag.slide, count)


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
        done = _micro_step(run, bags, _weight(run, step), again=None)
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
