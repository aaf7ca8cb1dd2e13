"""The metrics of a multi-label task: every label is a yes or no of its own, and may be missing."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ds_wsi.evaluation.metrics import FloatArray, IntArray
from ds_wsi.evaluation.task_metrics.measured import Measured, listed, one_of_each, slide_name, with_reasons
from ds_wsi.evaluation.task_metrics.thresholds import Thresholds, check_fitted_on
from ds_wsi.evaluation.weighted import area_under_roc, divide, mean_where

POOLED = 2**20  # pooled weights held at once: 8 MiB


def multilabel_metrics(
    targets: npt.ArrayLike,
    scores: npt.ArrayLike,
    label_names: Sequence[str],
    *,
    slide_ids: Sequence[str] | None = None,
) -> dict[str, Measured]:
    """Compute the metrics of a set of slides.

    Args:
        targets: float [N, L], 0 or 1, NaN where a label is missing: it counts nowhere.
        scores: float [N, L], logits or probabilities, higher for a label that is there; micro_auc alone compares
            them between labels.
        label_names: L.
        slide_ids: N names, for messages.

    Returns:
        The names of METRICS["multilabel"], then auc_LABEL, ap_LABEL and prevalence_LABEL of each label. A label of
        one kind of slide has no auc and no ap, is left out of the means, and is named as their reason.

    Raises:
        ValueError: shapes that do not fit, no slide, targets other than 0, 1 and NaN, scores that are not finite.
    """
    target_table, score_table = _check(targets, scores, label_names, slide_ids)
    values = weighted_multilabel_metrics(target_table, score_table, label_names, one_of_each(len(target_table)))
    return with_reasons(values, _reasons(target_table, label_names, values))


def weighted_multilabel_metrics(
    targets: FloatArray, scores: FloatArray, label_names: Sequence[str], counts: IntArray | FloatArray
) -> dict[str, FloatArray]:
    """Compute `multilabel_metrics` of each resample.

    Args:
        targets: float64 [N, L], with NaN where missing.
        scores: float64 [N, L].
        label_names: L.
        counts: integer or float [R, N], how often each resample holds each slide.

    Returns:
        Name -> float64 [R], NaN where the resample leaves the metric undefined.
    """
    weights = np.asarray(counts, dtype=np.float64)
    each: dict[str, FloatArray] = {}
    for column, name in enumerate(label_names):
        positives, negatives = weights * (targets[:, column] == 1), weights * (targets[:, column] == 0)
        area = area_under_roc(scores[:, column], positives, negatives)
        precision = average_precision(scores[:, column], positives, negatives)
        each[f"auc_{name}"] = area
        each[f"ap_{name}"] = np.where(np.isfinite(area), precision, np.nan)
        positive, negative = positives.sum(axis=1), negatives.sum(axis=1)
        each[f"prevalence_{name}"] = divide(positive, positive + negative)
    areas = np.stack([each[f"auc_{name}"] for name in label_names], axis=1)  # [R, L]
    precisions = np.stack([each[f"ap_{name}"] for name in label_names], axis=1)
    return {
        "macro_auc": mean_where(areas, np.isfinite(areas)),
        "map": mean_where(precisions, np.isfinite(precisions)),
        "micro_auc": _micro_auc(targets, scores, weights),
        **each,
    }


def average_precision(scores: FloatArray, positives: FloatArray, negatives: FloatArray) -> FloatArray:
    """Sum the precision at each score, weighted by the gain in recall; equal scores are one step.

    Args:
        scores: float64 [N], higher for the positive ones.
        positives, negatives: float64 [R, N], each slide's weight as one of either.

    Returns:
        Float64 [R]; NaN where no positive slide counts.
    """
    order = np.argsort(-scores, kind="stable")
    firsts = np.flatnonzero(np.diff(-scores[order], prepend=-np.inf))
    of_positives = np.add.reduceat(positives[:, order], firsts, axis=1)  # [R, groups]
    of_negatives = np.add.reduceat(negatives[:, order], firsts, axis=1)
    true, false = np.cumsum(of_positives, axis=1), np.cumsum(of_negatives, axis=1)
    precision = np.nan_to_num(divide(true, true + false))  # where nothing is predicted yet, recall gains nothing
    return divide((of_positives * precision).sum(axis=1), positives.sum(axis=1))


def fit_label_thresholds(
    targets: npt.ArrayLike, scores: npt.ArrayLike, label_names: Sequence[str], *, split: str
) -> Thresholds:
    """Fit each label's threshold to the highest sensitivity + specificity - 1; of equal ones the highest threshold.

    A label is predicted where its score is at least the threshold.

    Args:
        targets, scores, label_names: the validation split's, see `multilabel_metrics`.
        split: the split of these slides; the validation split alone may be fitted to.

    Returns:
        L thresholds, each one of the scores; NaN, with the reason, for a label of one kind of slide.

    Raises:
        ValueError: another split; see also `multilabel_metrics`.

    Source: Youden, Cancer 3 (1950), 32.
    """
    check_fitted_on(split)
    target_table, score_table = _check(targets, scores, label_names, None)
    values, reasons = [], []
    for column, name in enumerate(label_names):
        reason = _one_kind(target_table[:, column])
        values.append(float("nan") if reason else _youden(target_table[:, column], score_table[:, column]))
        reasons += [(name, reason)] if reason else []
    return Thresholds(tuple(values), split, tuple(reasons))


def _youden(targets: FloatArray, scores: FloatArray) -> float:
    is_known = np.isfinite(targets)
    positive, values = targets[is_known] == 1, scores[is_known]
    distinct, group = np.unique(-values, return_inverse=True)  # the highest score first
    true, false = (np.cumsum(np.bincount(group[kind], minlength=len(distinct))) for kind in (positive, ~positive))
    # Youden's index times both numbers of slides, in whole numbers: rounding would part equal ones.
    return float(-distinct[np.argmax(true * (~positive).sum() - false * positive.sum())])


def _micro_auc(targets: FloatArray, scores: FloatArray, weights: FloatArray) -> FloatArray:
    """The AUC of all cells [N, L] that are known; a slide's weight is that of each of its cells."""
    rows, columns = np.nonzero(np.isfinite(targets))
    if not rows.size:
        return np.full(len(weights), np.nan)
    positive, values = targets[rows, columns] == 1, scores[rows, columns]
    n_rows = max(1, POOLED // len(rows))
    parts = []
    for start in range(0, len(weights), n_rows):
        pooled = weights[start : start + n_rows, rows]
        parts.append(area_under_roc(values, pooled * positive, pooled * ~positive))
    return np.concatenate(parts)


def _one_kind(column: FloatArray) -> str:
    """Say why a label has no AUC; "" where it has slides of both kinds."""
    present = np.unique(column[np.isfinite(column)])
    if not present.size:
        return "missing on all slides"
    return "" if len(present) == 2 else f"{int(present[0])} on all slides"


def _reasons(targets: FloatArray, label_names: Sequence[str], values: dict[str, FloatArray]) -> dict[str, str]:
    reasons = {name: "" for name in values}
    left_out = []
    for column, name in enumerate(label_names):
        reason = _one_kind(targets[:, column])
        if reason:
            reasons[f"auc_{name}"] = reasons[f"ap_{name}"] = f"the label is {reason}"
            left_out.append(f"{name} ({reason})")
        if np.isnan(values[f"prevalence_{name}"][0]):
            reasons[f"prevalence_{name}"] = f"the label is {reason}"
    if left_out:
        reasons["macro_auc"] = reasons["map"] = f"left out: {listed(left_out)}"
    if np.isnan(values["micro_auc"][0]):
        reasons["micro_auc"] = "all labels that are known have one value"
    return reasons


def _check(
    targets: npt.ArrayLike, scores: npt.ArrayLike, label_names: Sequence[str], slide_ids: Sequence[str] | None
) -> tuple[FloatArray, FloatArray]:
    target_table, score_table = np.asarray(targets, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if len(set(label_names)) < len(label_names) or not label_names:
        raise ValueError(f"label_names must be at least one, each once, got {listed(label_names) or 'none'}")
    for name, table in (("targets", target_table), ("scores", score_table)):
        if table.ndim != 2 or table.shape[1] != len(label_names) or len(table) != len(target_table):
            raise ValueError(
                f"{name} must have shape [N, {len(label_names)}], got {list(table.shape)}. "
                "HINT: give one row per slide, one column per label."
            )
    if not len(target_table):
        raise ValueError("targets must hold at least one slide, got 0. HINT: look whether the split is empty.")
    for name, table, wrong, rule in (
        ("targets", target_table, ~(np.isin(target_table, (0, 1)) | np.isnan(target_table)), "be 0, 1 or NaN"),
        ("scores", score_table, ~np.isfinite(score_table), "be finite"),
    ):
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise ValueError(
                f"{name} must {rule}, got {table[row, column]} "
                f"({slide_name(int(row), slide_ids)}, label {label_names[column]}). "
                "HINT: a missing label is NaN; a score that is NaN comes from a diverged model."
            )
    return target_table, score_table
