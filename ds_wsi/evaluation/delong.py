"""DeLong's test of two AUCs on the same slides."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ds_wsi.evaluation.metrics import FloatArray


@dataclass(frozen=True)
class DeLong:
    """DeLong's comparison of two AUCs; NaN where fewer than two slides of a class, or no variance, leave it undefined.

    Attributes:
        auc_a, auc_b: areas under the ROC curves.
        difference: B minus A.
        covariance: float64 [2, 2] of the areas.
        standard_error: the difference's.
        z, p_value: two-sided, normal.
        low, high: the difference's interval.
    """

    auc_a: float
    auc_b: float
    difference: float
    covariance: FloatArray
    standard_error: float
    z: float
    p_value: float
    low: float
    high: float


def delong(positive: np.ndarray, scores_a: FloatArray, scores_b: FloatArray, confidence: float = 0.95) -> DeLong:
    """Test whether two scores of the same independent slides have the same AUC.

    Args:
        positive: bool [N].
        scores_a, scores_b: float64 [N], higher for the positive class; ties count one half.
        confidence: the interval's level, in (0, 1).

    Source: DeLong, DeLong and Clarke-Pearson (1988), equations 3 to 6; the components from midranks, in O(N log N):
    Sun and Xu (2014), equations 5 and 6.
    """
    components = [_components(positive, scores) for scores in (scores_a, scores_b)]
    auc_a, auc_b = (
        float(np.mean(positives)) if len(positives) and len(others) else math.nan for positives, others in components
    )
    counts = (int(positive.sum()), int((~positive).sum()))
    covariance = np.full((2, 2), math.nan)
    if min(counts) > 1:
        of_positives, of_negatives = (np.cov([each[side] for each in components]) / counts[side] for side in (0, 1))
        covariance = of_positives + of_negatives
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    difference = auc_b - auc_a
    # What is left of a variance of zero by rounding would make a z of nothing.
    if not variance > 1e-15:
        return DeLong(auc_a, auc_b, difference, covariance, *([math.nan] * 5))
    error = math.sqrt(variance)
    z = difference / error
    width = NormalDist().inv_cdf((1 + confidence) / 2) * error
    p_value = math.erfc(abs(z) / math.sqrt(2))
    low, high = max(-1.0, difference - width), min(1.0, difference + width)  # no two areas differ by more
    return DeLong(auc_a, auc_b, difference, covariance, error, z, p_value, low, high)


def _components(positive: np.ndarray, scores: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Each positive's share of negatives below it, and each negative's share of positives above it."""
    of_positives, others = scores[positive], scores[~positive]
    ranks = _midranks(scores)
    below = (ranks[positive] - _midranks(of_positives)) / max(1, len(others))
    above = 1 - (ranks[~positive] - _midranks(others)) / max(1, len(of_positives))
    return below, above


def _midranks(values: FloatArray) -> FloatArray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]
