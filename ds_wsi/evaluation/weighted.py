"""What metrics are made of, as functions of how often each slide counts: one row of weights per resample.

Weights are a bootstrap's counts: a metric of counts is the metric of the slides written out as often as they count.
"""

import numpy as np
import numpy.typing as npt

from ds_wsi.evaluation.metrics import FloatArray, IntArray

BoolArray = npt.NDArray[np.bool_]


def divide(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """Divide; NaN where the denominator is zero."""
    return np.divide(numerator, denominator, out=np.full_like(denominator, np.nan), where=denominator != 0)


def mean_where(values: FloatArray, chosen: BoolArray) -> FloatArray:
    """Mean of the chosen values of each row; NaN where none is."""
    return divide(np.where(chosen, values, 0.0).sum(axis=1), chosen.sum(axis=1).astype(np.float64))


def confusion_counts(labels: IntArray, predicted: IntArray, weights: FloatArray, classes: int) -> FloatArray:
    """Count the pairs of true and predicted class.

    Args:
        labels, predicted: int64 [N], in [0, classes).
        weights: float64 [R, N].
        classes: C.

    Returns:
        Float64 [R, C, C]: the sums of each row of weights, by true, then predicted class.
    """
    cells = np.zeros((len(labels), classes * classes))  # [N, C * C], one-hot
    cells[np.arange(len(labels)), labels * classes + predicted] = 1
    return (weights @ cells).reshape(-1, classes, classes)


def quadratic_weighted_kappa(confusion: FloatArray) -> FloatArray:
    """Cohen's kappa with squared distances as weights, of matrices [R, C, C]: float64 [R].

    NaN where all labels and predictions are one and the same class: no disagreement is expected by chance.

    Source: Cohen, Psychological Bulletin 70 (1968), 213.
    """
    grades = np.arange(confusion.shape[1])
    penalty = (grades[:, None] - grades[None, :]) ** 2
    expected = confusion.sum(axis=2)[:, :, None] * confusion.sum(axis=1)[:, None, :]  # [R, C, C]
    total = confusion.sum(axis=(1, 2))
    return 1 - divide(total * (penalty * confusion).sum(axis=(1, 2)), (penalty * expected).sum(axis=(1, 2)))


def area_under_roc(scores: FloatArray, positives: FloatArray, negatives: FloatArray) -> FloatArray:
    """Fraction of (positive, negative) pairs in the right order, equal scores counting one half.

    Args:
        scores: float64 [N], higher for the positive ones.
        positives, negatives: float64 [R, N], each slide's weight as one of either.

    Returns:
        Float64 [R]; NaN where all weights of either kind are zero.
    """
    order = np.argsort(scores, kind="stable")
    firsts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # where each group of equal scores begins
    of_positives = np.add.reduceat(positives[:, order], firsts, axis=1)  # [R, groups]
    of_negatives = np.add.reduceat(negatives[:, order], firsts, axis=1)
    below = np.cumsum(of_negatives, axis=1) - of_negatives / 2
    return divide((of_positives * below).sum(axis=1), of_positives.sum(axis=1) * of_negatives.sum(axis=1))
