"""A micro-step's forward and its loss on this process: of classes, and of other tasks that are sums over bags."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ds_wsi.bags.bag import Bag
from ds_wsi.models.loss import distillation_losses, stack_loss
from ds_wsi.models.output import SlideOutput
from ds_wsi.runtime.errors import naming
from ds_wsi.runtime.words import counted
from ds_wsi.stacking.randomness import bag_randomness
from ds_wsi.targets.denominators import target_factor
from ds_wsi.targets.several import SeveralTargets
from ds_wsi.targets.sums import connected_zero
from ds_wsi.tile_parallel.collectives import Traffic, share_numbers
from ds_wsi.training.context import RunContext
from ds_wsi.training.epoch_plan import PlannedStep
from ds_wsi.training.finite import BagsAndLosses
from ds_wsi.training.micro_step import MicroStep, on_device, scales_of_stack, stack_of
from ds_wsi.training.run import Run
from ds_wsi.training.step import bag_weight, blank_tile, idle_loss, idle_output


class Computed(NamedTuple):
    """What a micro-step came to on this process.

    Attributes:
        loss: what backward starts from.
        n_tiles: tiles that it took.
        seen: what it was of.
        told: the part of the step's loss that is reported, where it is another number.
        distilled: the sum of the bags' distances from a teacher's features, times the ranks that share a bag; None
            where there is no teacher, or no bag.
    """

    loss: Tensor
    n_tiles: int
    seen: BagsAndLosses
    told: Tensor | None = None
    distilled: Tensor | None = None


class StepUnits(NamedTuple):
    """What a step's loss is divided by, known from the plan and the manifest on every process.

    Attributes:
        total: bags, or the labelled units of another task; of cox the events.
        factors: one on the sum of each of several targets, see `SeveralTargets.factors`; else none.
    """

    total: int
    factors: tuple[float, ...] = ()


def step_units(run: RunContext, step: PlannedStep) -> StepUnits:
    """What the step's loss is divided by: counted once per step, without communication."""
    if run.task is None:
        return StepUnits(step.plan.n_bags)
    rows = run.cohort.rows("train")
    slides = [rows[slide] for groups in step.plan.micro_steps for group in groups for slide in group]
    targets = run.task.targets([run.cohort.manifest.slides[slide].target for slide in slides])
    if run.task.couples:
        return StepUnits(int((targets[:, 1] == 1).sum()))
    factors = run.task.factors(targets) if isinstance(run.task, SeveralTargets) else ()
    return StepUnits(run.task.units(targets), factors)


def step_weight(run: RunContext, step: PlannedStep, units: int) -> float:
    """The factor of a micro-step's loss, see `bag_weight` and `target_factor`; units as `step_units` counts them."""
    # Ranks that share a bag each compute its loss: there are as many means to take as groups.
    groups, micro_steps = run.mesh.slide_size, len(step.plan.micro_steps)
    if run.task is None:
        return bag_weight(units, groups, micro_steps)
    return target_factor(1 if run.task.couples else units, groups, micro_steps)


def distillation_weight(run: RunContext, step: PlannedStep) -> float:
    """The factor of a micro-step's `distilled`: its mean is over the step's bags, whatever the task counts."""
    assert run.teacher is not None
    return run.teacher.weight * bag_weight(step.plan.n_bags, run.mesh.slide_size, len(step.plan.micro_steps))


def distilled_of(run: Run, step: MicroStep, output: SlideOutput) -> Tensor | None:
    """How far the features of a micro-step's bags are from the teacher's, see `Computed`.

    Collective over the ranks that share bags: their counts of tiles are gathered.
    """
    if run.teacher is None:
        return None
    assert output.features is not None
    there = torch.cat([run.teacher.of_bag(bag) for bag in step.bags]).to(run.device)
    lengths = [len(bag.kept) for bag in step.bags]
    of_bags = distillation_losses(output.features, there, lengths, _whole_counts(run, step.bags), run.teacher.kind)
    # Of a shared bag each rank has its own tiles' part, where the loss above it is on all of them.
    return of_bags.sum() * run.mesh.tile_size


def micro_loss(run: Run, step: MicroStep, factors: Sequence[float] = ()) -> Computed:
    """The sum of the losses of a micro-step's bags, with its graph. Collective, as the model's forward is.

    Args:
        run: the run that takes the step.
        step: the micro-step's bags.
        factors: those of several targets, see `StepUnits`.
    """
    if not step.bags:
        blank = blank_of(run)
        zero = idle_loss(run.model, blank) if run.task is None else connected_zero(idle_output(run.model, blank).logits)
        return Computed(zero, 0, nothing_seen())
    output = micro_output(run, step)
    if run.task is not None:
        targets = targets_of(run, step).to(output.logits.device, non_blocking=True)
        loss = (
            run.task.loss_sum(output.logits, targets, factors)
            if isinstance(run.task, SeveralTargets)
            else run.task.loss_sum(output.logits, targets)
        )
        return _computed(run, step, output, loss)
    labels = on_device([run.cohort.manifest.slides[bag.slide].class_index for bag in step.bags], run.device)
    chosen = run.settings.optim.class_weights
    weights = None if chosen is None else torch.tensor(chosen, device=run.device)[labels]
    return _computed(run, step, output, stack_loss(output, labels, weights))


def _computed(run: Run, step: MicroStep, output: SlideOutput, loss: Tensor) -> Computed:
    n_tiles = sum(map(len, step.tiles))
    return Computed(loss, n_tiles, seen_of(run, step, output), distilled=distilled_of(run, step, output))


def micro_output(run: Run, step: MicroStep) -> SlideOutput:
    """The model's output of a micro-step that has a bag. Collective, as its forward is."""
    require_tiles(run, step.bags)
    more: list[Tensor | None] = []
    if run.task is None:
        classes = [run.cohort.manifest.slides[bag.slide].class_index for bag in step.bags]
        more.append(on_device(classes, run.device))
    if run.module.scale_embedding is not None:
        more = [*(more or [None]), scales_of_stack(run, step)]
    stack = stack_of(run, step)
    with bag_randomness(step.keys, part=run.mesh.tile_rank), _naming_slides(run, step):
        output: SlideOutput = run.model(stack, *more)
    return output


def targets_of(run: RunContext, step: MicroStep) -> Tensor:
    """The bags' targets, float64 [B, k] on the host."""
    assert run.task is not None
    return run.task.targets([run.cohort.manifest.slides[bag.slide].target for bag in step.bags])


def seen_of(run: RunContext, step: MicroStep, output: SlideOutput) -> BagsAndLosses:
    """The bags, and whether each one's output is finite."""
    slides = tuple(run.cohort.manifest.slides[bag.slide].slide_id for bag in step.bags)
    return BagsAndLosses(slides, output.logits.detach().isfinite().all(-1))


def nothing_seen() -> BagsAndLosses:
    """What a process without a bag has seen."""
    return BagsAndLosses((), torch.ones(0, dtype=torch.bool))


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


def blank_of(run: RunContext) -> Tensor:
    """A bag of one blank instance, of what the model takes."""
    if run.cohort.in_dim is not None:
        return torch.zeros(1, run.cohort.in_dim, device=run.device)
    return blank_tile(run.settings.policies.tiling.tile_size_px, run.device)


def require_tiles(run: Run, bags: list[Bag]) -> None:
    """Refuse, on all ranks that share it, a bag of which none could read a tile."""
    if run.mesh.tile_size == 1 or not bags:
        return
    for bag, count in zip(bags, _whole_counts(run, bags), strict=True):
        run.failures.require_tiles(bag.slide, count)


def _whole_counts(run: RunContext, bags: list[Bag]) -> list[int]:
    """Tiles of each bag on all ranks that share it. Collective over these."""
    counts = [len(bag.tiles) for bag in bags]
    if run.mesh.tile_size == 1:
        return counts
    return [int(count) for count in share_numbers(counts, run.mesh.group, run.device, Traffic()).sum(0).tolist()]
