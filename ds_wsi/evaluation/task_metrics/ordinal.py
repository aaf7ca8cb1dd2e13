"""The metrics of an ordinal task, whose classes are grades in an order, and thresholds on a raw score."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ds_wsi.evaluation.metrics import FloatArray, IntArray
from ds_wsi.evaluation.task_metrics.measured import (
    Measured,
    finite_column,
    integer_column,
    one_of_each,
    with_reasons,
)
from ds_wsi.evaluation.task_metrics.thresholds import Thresholds, check_fitted_on
from ds_wsi.evaluation.weighted import confusion_counts, quadratic_weighted_kappa

MAX_ROUNDS = 50
RISE = 1e-12  # of kappa, below which a round has found nothing better


def ordinal_metrics(
    grades: npt.ArrayLike, predicted: npt.ArrayLike, n_grades: int, *, slide_ids: Sequence[str] | None = None
) -> dict[str, Measured]:
    """Compute the metrics of a set of slides.

    Args:
        grades, predicted: integer [N], in [0, n_grades).
        n_grades: K, those that no slide has included: kappa counts the distance over them.
        slide_ids: N names, for messages.

    Returns:
        The names of METRICS["ordinal"] -> value; kappa is NaN, with the reason, where grades and predictions are all
        one and the same grade.

    Raises:
        ValueError: fewer than two grades, shapes that do not fit, no slide, a grade outside; its slide is named.
    """
    if n_grades < 2:
        raise ValueError(f"n_grades must be at least 2, got {n_grades}")
    grade_column = integer_column("grades", grades, n_grades, slide_ids=slide_ids)
    predicted_column = integer_column("predicted", predicted, n_grades, len(grade_column), slide_ids)
    values = weighted_ordinal_metrics(grade_column, predicted_column, n_grades, one_of_each(len(grade_column)))
    reason = f"all grades and predictions are {grade_column[0]}" if np.isnan(values["quadratic_weighted_kappa"]) else ""
    return with_reasons(values, {"quadratic_weighted_kappa": reason})


def weighted_ordinal_metrics(
    grades: IntArray, predicted: IntArray, n_grades: int, counts: IntArray | FloatArray
) -> dict[str, FloatArray]:
    """Compute `ordinal_metrics` of each resample.

    Args:
        grades, predicted: int64 [N].
        n_grades: K.
        counts: integer or float [R, N], how often each resample holds each slide.

    Returns:
        Name -> float64 [R], NaN where the resample leaves the metric undefined.
    """
    weights = np.asarray(counts, dtype=np.float64)
    total = weights.sum(axis=1)
    confusion = confusion_counts(grades, predicted, weights, n_grades)
    return {
        "quadratic_weighted_kappa": quadratic_weighted_kappa(confusion),
        "accuracy": np.trace(confusion, axis1=1, axis2=2) / total,
        "mae": weights @ np.abs(grades - predicted) / total,
    }


def fit_grade_thresholds(scores: npt.ArrayLike, grades: npt.ArrayLike, n_grades: int, *, split: str) -> Thresholds:
    """Fit the thresholds between grades on a raw score to the highest quadratic weighted kappa.

    One threshold after the other moves to its best place between its neighbours, from k + 0.5 on, until none gains:
    a local maximum. Places are the middles between neighbouring scores.

    Args:
        scores: float [N], the model's raw scores of the validation split, about k for grade k.
        grades: integer [N].
        n_grades: K.
        split: the split of these slides; the validation split alone may be fitted to.

    Returns:
        K - 1 thresholds, ascending; as they began where all scores or all grades are the same.

    Raises:
        ValueError: another split, fewer than two grades, shapes that do not fit, numbers that are not finite, a grade
            outside.
    """
    check_fitted_on(split)
    if n_grades < 2:
        raise ValueError(f"n_grades must be at least 2, got {n_grades}")
    score_column = finite_column("scores", scores)
    grade_column = integer_column("grades", grades, n_grades, len(score_column))
    distinct, group = np.unique(score_column, return_inverse=True)
    below = np.zeros((len(distinct) + 1, n_grades))  # of each grade, how many slides lie below each place
    np.add.at(below, (group + 1, grade_column), 1)
    below = np.cumsum(below, axis=0)
    start = np.searchsorted(distinct, np.arange(n_grades - 1) + 0.5, side="right")
    # Of one grade kappa is undefined, or 0 wherever the cuts are.
    cuts = _climb(below, start) if len(np.unique(grade_column)) > 1 else start
    # Half a grade beyond the scores on either side.
    middles = np.concatenate([[distinct[0] - 0.5], (distinct[1:] + distinct[:-1]) / 2, [distinct[-1] + 0.5]])
    values = np.where(cuts == start, np.arange(n_grades - 1) + 0.5, middles[cuts])
    # A threshold that stayed may lie above the middle to which the next one moved, with no score between.
    return Thresholds(tuple(np.maximum.accumulate(values).tolist()), split)


def _climb(below: FloatArray, start: IntArray) -> IntArray:
    """Move one cut at a time to its best place."""
    cuts, best = start.copy(), -math.inf
    for _ in range(MAX_ROUNDS):
        before = best
        for index in range(len(cuts)):
            low = cuts[index - 1] if index else 0
            high = cuts[index + 1] if index + 1 < len(cuts) else len(below) - 1
            places = np.arange(low, high + 1)
            kappas = np.nan_to_num(_kappas(below, cuts, index, places), nan=-math.inf)
            at_present = kappas[cuts[index] - low]
            if kappas.max() > at_present + RISE:
                cuts[index] = places[kappas.argmax()]
            best = max(kappas.max(), at_present)
        if not best > before + RISE:
            break
    return cuts


def _kappas(below: FloatArray, cuts: IntArray, index: int, places: IntArray) -> FloatArray:
    """Return the kappa with one cut at each of the places: float64 [P]."""
    n_grades = below.shape[1]
    bounds = np.concatenate([[0], cuts, [len(below) - 1]])
    moved = np.tile(bounds, (len(places), 1))  # [P, K + 1]
    moved[:, index + 1] = places
    counts = below[moved]  # [P, K + 1, true]
    confusion = np.diff(counts, axis=1).transpose(0, 2, 1)  # [P, true, predicted]
    assert confusion.shape[1:] == (n_grades, n_grades)
    return quadratic_weighted_kappa(confusion)


def grades_of_scores(scores: npt.ArrayLike, thresholds: Thresholds) -> IntArray:
    """Return the grade of each raw score: int64 [N], how many thresholds it is above; equal is below.

    Raises:
        ValueError: scores that are not finite.
    """
    return np.searchsorted(np.array(thresholds.values), finite_column("scores", scores), side="left").astype(np.int64)
