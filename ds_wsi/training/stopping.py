"""Early stopping: a function of the history alone, so that every rank and every resumed run comes to the same."""

import math

import numpy as np

from ds_wsi.bags.cohort import Cohort
from ds_wsi.evaluation.metrics import slide_metrics
from ds_wsi.evaluation.task_metrics.table import LOWER_IS_BETTER, better_number
from ds_wsi.runtime.log import logger
from ds_wsi.targets.choices import CLASSIFICATION
from ds_wsi.training.settings import RunSettings, TrainSettings
from ds_wsi.training.task import chosen_metric


def stop_reason(history: list[dict[str, float]], metric: str, patience: int) -> str | None:
    """Why training should stop, or None.

    Args:
        history: an entry an epoch; those without `eval_loss` are not validated yet, and do not count.
        metric: key of the entries; an epoch without it has not improved.
        patience: epochs without a new best value that stop; 0 never does.
    """
    validated = [entry for entry in history if "eval_loss" in entry]
    if not patience or not validated:
        return None
    best = max(validated, key=lambda entry: better_number(metric, entry.get(metric)))  # the first of equals
    since = len(validated) - 1 - validated.index(best)
    if since < patience:
        return None
    how = "fallen below" if metric.removeprefix("eval_") in LOWER_IS_BETTER else "risen above"
    return (
        f"{metric} has not {how} {best.get(metric, math.nan):.4g} of epoch {best['epoch']:g} in {since} epochs "
        f"(--early_stopping_patience {patience})"
    )


def stopping_words(all_settings: TrainSettings) -> str | None:
    """What decides when a run stops early; None where nothing does."""
    settings = all_settings.run
    if not settings.early_stopping_patience:
        return None
    beside = ", validated beside training" if settings.validate_beside else ""
    return f"patience {settings.early_stopping_patience} on {chosen_metric(all_settings)}{beside}"


def require_metric(settings: RunSettings, cohort: Cohort) -> None:
    """Refuse a cohort on whose validation split early stopping could see nothing; without it, warn of such a split.

    Raises:
        ValueError: without a validation split, or with one that leaves the metric undefined.
    """
    rows = cohort.rows("validation")
    given = f"--early_stopping_patience {settings.early_stopping_patience}"
    if not rows:
        if settings.early_stopping_patience:
            raise ValueError(f"{given} must be given with a validation split, got none ({cohort.manifest.source})")
        return
    if cohort.manifest.kind != CLASSIFICATION:
        return  # of its targets `target_problems` tells
    labels = np.array([cohort.manifest.slides[row].class_index for row in rows], dtype=np.int64)
    metric = settings.metric_for_best_model
    if not math.isnan(slide_metrics(labels, np.eye(len(cohort.manifest.classes))[labels])[metric]):
        return
    if settings.early_stopping_patience:
        raise ValueError(
            f"{given} needs a validation split that defines {metric}, got slides of one class alone "
            f"({cohort.manifest.source}). HINT: --metric_for_best_model accuracy, or another split."
        )
    logger.warning(
        "the validation split holds slides of one class alone, which leaves %s undefined: the last epoch's "
        "weights are exported (%s). HINT: --metric_for_best_model accuracy, or another split.",
        *(metric, cohort.manifest.source),
    )
