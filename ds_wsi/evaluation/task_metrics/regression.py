"""The metrics of a regression task: pure functions of targets and predictions in the target's own unit."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ds_wsi.evaluation.metrics import FloatArray, IntArray
from ds_wsi.evaluation.task_metrics.measured import Measured, finite_column, one_of_each, with_reasons
from ds_wsi.evaluation.weighted import BoolArray, divide


def regression_metrics(
    targets: npt.ArrayLike, predictions: npt.ArrayLike, *, slide_ids: Sequence[str] | None = None
) -> dict[str, Measured]:
    """Compute the metrics of a set of slides.

    Args:
        targets: float [N], finite; slides without a target are left out before.
        predictions: float [N], in the targets' unit, not standardised.
        slide_ids: N names, for messages.

    Returns:
        The names of METRICS["regression"] -> value; NaN with a reason:
        pearson, spearman: where targets or predictions are all the same.
        r2: where the targets are all the same.

    Raises:
        ValueError: shapes that do not fit, no slide, numbers that are not finite; the first such slide is named.
    """
    target_column = finite_column("targets", targets, slide_ids=slide_ids)
    predicted = finite_column("predictions", predictions, len(target_column), slide_ids)
    values = weighted_regression_metrics(target_column, predicted, one_of_each(len(target_column)))
    reasons = dict.fromkeys(values, "")
    for name, column in (("predictions", predicted), ("targets", target_column)):
        if np.ptp(column) == 0:
            undefined = ("pearson", "spearman", "r2") if name == "targets" else ("pearson", "spearman")
            reasons |= dict.fromkeys(undefined, f"all {name} are {column[0]:g}")
    return with_reasons(values, reasons)


def weighted_regression_metrics(
    targets: FloatArray, predictions: FloatArray, counts: IntArray | FloatArray
) -> dict[str, FloatArray]:
    """Compute `regression_metrics` of each resample.

    Args:
        targets, predictions: float64 [N].
        counts: integer or float [R, N], how often each resample holds each slide.

    Returns:
        Name -> float64 [R], NaN where the resample leaves the metric undefined.
    """
    weights = np.asarray(counts, dtype=np.float64)
    shares = weights / weights.sum(axis=1, keepdims=True)
    constant = _constant(targets, weights) | _constant(predictions, weights)
    errors = predictions - targets
    squared = shares @ errors**2
    variance = _covariance(targets, targets, shares)
    return {
        "pearson": np.where(constant, np.nan, _correlation(targets, predictions, shares)),
        "spearman": np.where(
            constant, np.nan, _correlation(_ranks(targets, weights), _ranks(predictions, weights), shares)
        ),
        "r2": np.where(_constant(targets, weights), np.nan, 1 - divide(squared, variance)),
        "mae": shares @ np.abs(errors),
        "rmse": np.sqrt(squared),
    }


def _constant(values: FloatArray, weights: FloatArray) -> BoolArray:
    """Whether all values that count are one: bool [R]. A variance may be rounding."""
    counts = weights > 0
    lowest = np.where(counts, values, np.inf).min(axis=1)
    highest = np.where(counts, values, -np.inf).max(axis=1)
    same: BoolArray = lowest >= highest
    return same


def _covariance(a: FloatArray, b: FloatArray, shares: FloatArray) -> FloatArray:
    """The covariance of values [N] or [R, N] under shares [R, N]: float64 [R]; centred first, to keep the digits."""
    centred = [values - (shares * values).sum(axis=1, keepdims=True) for values in (a, b)]
    return np.asarray((shares * centred[0] * centred[1]).sum(axis=1))


def _correlation(a: FloatArray, b: FloatArray, shares: FloatArray) -> FloatArray:
    spread = np.sqrt(_covariance(a, a, shares)) * np.sqrt(_covariance(b, b, shares))
    return np.clip(divide(_covariance(a, b, shares), spread), -1, 1)  # rounding may go beyond


def _ranks(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Ranks within each resample, up to a constant: float64 [R, N]; equal values share the mean of theirs."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    firsts = np.flatnonzero(np.diff(group[order], prepend=-1))
    sizes = np.add.reduceat(weights[:, order], firsts, axis=1)  # [R, groups]
    ranks: FloatArray = (np.cumsum(sizes, axis=1) - sizes / 2)[:, group]
    return ranks
