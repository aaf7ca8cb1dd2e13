"""The slides and tiles that a run trains on, by step: what its reader is asked for, and what its steps take."""

from collections.abc import Iterator
from typing import NamedTuple

from ds_wsi.bags.bag import BagPart
from ds_wsi.bags.sampler import StepPlan, plan_epoch, share_tiles
from ds_wsi.stacking.balance import OverCapError
from ds_wsi.training.context import RunContext
from ds_wsi.training.run import Progress


class PlannedStep(NamedTuple):
    """An optimizer step of a run, and what this rank reads for it.

    Attributes:
        epoch: the number of the step's epoch, from 0.
        number: the step's number in the run, from 0.
        plan: the slides that it trains on, on which rank.
        parts: this rank's tiles of each micro-step's bags, in order.
    """

    epoch: int
    number: int
    plan: StepPlan
    parts: tuple[tuple[BagPart, ...], ...]


def epoch_plan(run: RunContext, epoch: int) -> tuple[StepPlan, ...]:
    """The epoch's steps; where norms average over a step, its bags are encoded together, in one micro-step."""
    plan = _dealt(run, epoch)
    return tuple(step.as_one for step in plan) if run.config.norm_training == "step" else plan


def _dealt(run: RunContext, epoch: int) -> tuple[StepPlan, ...]:
    rows = run.cohort.rows("train")
    try:
        return plan_epoch(len(rows), run.step_layout, seed=run.seed, epoch=epoch, lengths=run.training_tiles)
    except OverCapError as error:
        slide = "" if error.bag is None else f" ({run.cohort.manifest.slides[rows[error.bag]].words})"
        raise ValueError(
            f"{error}{slide}. HINT: raise --max_tiles_per_rank or --virtual_workers, share slides among ranks with "
            "--tile_parallel_size, or take fewer tiles with --tiles_per_slide."
        ) from error


def planned_steps(run: RunContext, progress: Progress) -> Iterator[PlannedStep]:
    """The steps of a run from where it stands to its last epoch's end, in order, each made when it is asked for."""
    rows = run.cohort.rows("train")
    first, skip, number = progress.epoch, progress.step_in_epoch, progress.global_step
    for epoch in range(first, run.epochs):
        for plan in epoch_plan(run, epoch)[skip:]:
            micro_steps = [[rows[slide] for slide in groups[run.mesh.slide_rank]] for groups in plan.micro_steps]
            yield PlannedStep(epoch, number, plan, tuple(_parts_of(run, epoch, slides) for slides in micro_steps))
            number += 1
        skip = 0


def _parts_of(run: RunContext, epoch: int, slides: list[int]) -> tuple[BagPart, ...]:
    """This rank's tiles of its group's slides of one micro-step: the same set of tiles for any number of ranks."""
    shares = run.settings.policies.tile_parallel.shares or (1.0,) * run.mesh.tile_size
    grids, budget = run.cohort.grids, run.tile_budget
    chosen = [budget.choose(grids[slide], slide, run.seed, epoch) for slide in slides]
    lengths = [
        run.cohort.lengths[slide] if rows is None else len(rows) for slide, rows in zip(slides, chosen, strict=True)
    ]
    stretches = share_tiles(lengths, shares)[run.mesh.tile_rank]
    return tuple(
        BagPart(slide, start, stop, None if rows is None else rows[start:stop])
        for slide, rows, (start, stop) in zip(slides, chosen, stretches, strict=True)
    )


def count_steps(run: RunContext) -> tuple[int, int]:
    """Optimizer steps of an epoch, and of the run."""
    an_epoch = run.step_layout.steps_per_epoch(len(run.cohort.rows("train")))
    return an_epoch, an_epoch * run.epochs
