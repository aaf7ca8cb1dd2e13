"""Which slides and tiles a run trains on in an epoch, step by step."""

from collections.abc import Iterator

from ds_wsi.bags.bag import BagPart
from ds_wsi.bags.sampler import StepPlan, choose_tiles, plan_epoch, share_tiles
from ds_wsi.stacking.balance import OverCapError
from ds_wsi.training.run import Run


def epoch_plan(run: Run, epoch: int) -> tuple[StepPlan, ...]:
    """The epoch's steps; where norms average over a step, its bags are encoded together, in one micro-step."""
    plan = _dealt(run, epoch)
    return tuple(step.as_one for step in plan) if run.config.norm_training == "step" else plan


def _dealt(run: Run, epoch: int) -> tuple[StepPlan, ...]:
    rows = run.cohort.rows("train")
    seed = run.settings.run.seed
    try:
        return plan_epoch(len(rows), run.step_layout, seed=seed, epoch=epoch, lengths=run.training_tiles)
    except OverCapError as error:
        slide = "" if error.bag is None else f" (slide {run.cohort.manifest.slides[rows[error.bag]].slide_id})"
        raise ValueError(
            f"{error}{slide}. HINT: raise --max_tiles_per_rank or --virtual_workers, share slides among ranks with "
            "--tile_parallel_size, or take fewer tiles with --tiles_per_slide."
        ) from error


def parts_to_read(run: Run) -> Iterator[BagPart]:
    """Everything this rank trains on from here to the end, in order: what the workers read ahead."""
    rows, mesh = run.cohort.rows("train"), run.mesh
    first, skip = run.progress.epoch, run.progress.step_in_epoch
    for epoch in range(first, run.settings.optim.num_train_epochs):
        for step in epoch_plan(run, epoch)[skip:]:
            for groups in step.micro_steps:
                yield from parts_of(run, epoch, [rows[slide] for slide in groups[mesh.slide_rank]])
        skip = 0


def parts_of(run: Run, epoch: int, slides: list[int]) -> list[BagPart]:
    """This rank's tiles of its group's slides of one micro-step: the same set of tiles for any number of ranks."""
    seed, wanted = run.settings.run.seed, run.settings.policies.reading.tiles_per_slide
    shares = run.settings.policies.tile_parallel.shares or (1.0,) * run.mesh.tile_size
    chosen = [choose_tiles(run.cohort.lengths[slide], wanted, (seed, epoch, slide)) for slide in slides]
    lengths = [
        run.cohort.lengths[slide] if rows is None else len(rows) for slide, rows in zip(slides, chosen, strict=True)
    ]
    stretches = share_tiles(lengths, shares)[run.mesh.tile_rank]
    return [
        BagPart(slide, start, stop, None if rows is None else rows[start:stop])
        for slide, rows, (start, stop) in zip(slides, chosen, stretches, strict=True)
    ]


def count_steps(run: Run) -> tuple[int, int]:
    """Optimizer steps of an epoch, and of the run."""
    an_epoch = run.step_layout.steps_per_epoch(len(run.cohort.rows("train")))
    return an_epoch, an_epoch * run.settings.optim.num_train_epochs
