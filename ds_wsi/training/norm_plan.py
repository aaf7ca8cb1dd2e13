"""What is measured of a run's norms after each epoch."""

from collections.abc import Sequence

from ds_wsi.bags.bag import BagPart
from ds_wsi.bags.sampler import choose_tiles
from ds_wsi.evaluation.norm_choice import NormPlan, candidates_of
from ds_wsi.norms import batch_norms
from ds_wsi.training.run import Run

GAP_SLIDES = 8  # on which the gap is measured, or as many as training averages over, if that is more
GAP_TILES = 64  # of each
MOST_GAP_SLIDES = 32


def has_moving_norms(run: Run) -> bool:
    """Whether the encoder has a BatchNorm whose running statistics move in training."""
    return run.config.norm_training != "frozen" and bool(batch_norms(run.module.encoder))


def norm_plan(run: Run) -> NormPlan:
    """Candidates on the validation split; without one, where there is a choice, on training slides."""
    training, policy = run.config.norm_training, run.settings.policies.norm
    moving = has_moving_norms(run)
    names = candidates_of(policy.evaluation, training, has_norms=bool(batch_norms(run.module.encoder)))
    rows, split = run.cohort.rows("validation"), "validation"
    if not rows:
        rows, split = (run.cohort.rows("train") if len(names) > 1 else ()), "train"
    layout = run.step_layout
    bags = {"step": layout.bags_per_step, "stack": layout.bags_per_group}.get(training, 1)
    train = run.cohort.rows("train")
    some = train[: min(MOST_GAP_SLIDES, max(GAP_SLIDES, bags))]
    return NormPlan(
        training=training,
        candidates=names,
        metric=run.settings.run.metric_for_best_model,
        rows=rows,
        split=split,
        recalibration=_parts(run, train, policy.recalibration_tiles) if "recalibrated" in names else (),
        gap=_parts(run, some, min(GAP_TILES, run.settings.policies.reading.tiles_per_slide or GAP_TILES))
        if moving
        else (),
        bags_per_population=max(1, bags),
    )


def _parts(run: Run, rows: Sequence[int], tiles: int) -> tuple[BagPart, ...]:
    """So many tiles of each slide, the same ones after every epoch; 0 takes all."""
    found = []
    for row in rows:
        length = run.cohort.lengths[row]
        found.append(BagPart(row, 0, length, choose_tiles(length, tiles or None, (run.settings.run.seed, 0, row))))
    return tuple(found)
