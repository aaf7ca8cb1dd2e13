"""What is measured of a run's norms after each epoch."""

import math
from collections.abc import Sequence

from ds_wsi.bags.bag import BagPart
from ds_wsi.bags.sampler import choose_tiles
from ds_wsi.bags.step_layout import StepLayout
from ds_wsi.evaluation.norm_choice import NormPlan, candidates_of
from ds_wsi.evaluation.tasks.several import answers_of
from ds_wsi.norms import batch_norms
from ds_wsi.training.context import RunContext

GAP_SLIDES = 8  # on which the gap is measured, or as many more as make whole populations of training
GAP_TILES = 64  # of each
MOST_GAP_SLIDES = 32  # of one population


def bags_of_population(training: str, layout: StepLayout) -> int:
    """How many bags the norms average over at once in training; 1 where that is none."""
    if training == "step":
        return layout.bags_per_step
    if training == "stack":  # a policy that deals the bags of a step deals about as many to each
        return max(1, layout.bags_per_step // (layout.groups * layout.micro_steps))
    return 1


def has_moving_norms(run: RunContext) -> bool:
    """Whether the encoder has a BatchNorm whose running statistics move in training."""
    return run.config.norm_training != "frozen" and bool(batch_norms(run.module.encoder))


def measures_norms(run: RunContext) -> bool:
    """Whether the exported model can be another one than the one that was trained: that is told, and kept."""
    if not batch_norms(run.module.encoder):
        return False
    return run.config.norm_training != "frozen" or _candidates(run) != ("running",)


def _candidates(run: RunContext) -> tuple[str, ...]:
    evaluation, has_norms = run.settings.policies.norm.evaluation, bool(batch_norms(run.module.encoder))
    return candidates_of(evaluation, run.config.norm_training, has_norms=has_norms)


def norm_plan(run: RunContext) -> NormPlan:
    """Candidates on the validation split; without one, where there is a choice, on training slides."""
    training, policy = run.config.norm_training, run.settings.policies.norm
    names = _candidates(run)
    rows, split = run.cohort.rows("validation"), "validation"
    if not rows:
        rows, split = (run.cohort.rows("train") if len(names) > 1 else ()), "train"
    bags = min(MOST_GAP_SLIDES, bags_of_population(training, run.step_layout))
    train = run.cohort.rows("train")
    some = train[: bags * math.ceil(GAP_SLIDES / bags)]
    lengths = run.cohort.lengths
    norms = batch_norms(run.module.encoder)
    of_slides = bool(norms) and (names != ("running",) or any(norm.running_mean is None for norm in norms))
    return NormPlan(
        training=training,
        candidates=names,
        metric=run.best_metric.removeprefix("eval_"),
        answers=None if run.task is None else answers_of(run.config),
        rows=rows,
        split=split,
        recalibration=_parts(run, train, policy.recalibration_tiles) if "recalibrated" in names else (),
        gap=_parts(run, some, min(GAP_TILES, run.reading.tiles_per_slide or GAP_TILES)) if measures_norms(run) else (),
        bags_per_population=bags,
        resting_epochs=run.settings.model.freeze_encoder_epochs,
        # A test slide of one tile may have no statistics of its own: known before it is the exported model's turn.
        probes=tuple(row for row in run.cohort.rows("test") if lengths[row] == 1) if rows and of_slides else (),
    )


def _parts(run: RunContext, rows: Sequence[int], tiles: int) -> tuple[BagPart, ...]:
    """Parts of so many tiles of each slide, the same ones after every epoch; 0 takes all."""
    parts = []
    for row in rows:
        length = run.cohort.lengths[row]
        parts.append(BagPart(row, 0, length, choose_tiles(length, tiles or None, (run.seed, 0, row))))
    return tuple(parts)
