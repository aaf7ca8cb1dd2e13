"""The log-rank test: whether groups of slides have the same survival curve."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ds_wsi.evaluation.metrics import FloatArray
from ds_wsi.evaluation.task_metrics.follow_up import FollowUp
from ds_wsi.evaluation.task_metrics.kaplan_meier import life_table
from ds_wsi.evaluation.task_metrics.measured import check_length


@dataclass(frozen=True)
class LogRank:
    """A log-rank test.

    Attributes:
        statistic: chi-squared; NaN where undefined.
        degrees: degrees of freedom.
        p_value: two-sided.
        observed, expected: float64 [G], events in each group and those expected were the curves the same.
        reason: why it is undefined; "" where it is not.
    """

    statistic: float
    degrees: int
    p_value: float
    observed: FloatArray
    expected: FloatArray
    reason: str = ""


def log_rank(follow_up: FollowUp, groups: npt.ArrayLike, counts: npt.ArrayLike | None = None) -> LogRank:
    """Test whether groups have the same survival, with the hypergeometric variance.

    Groups without an expected event, whose follow-up ended before the first one, are left out.

    Args:
        follow_up: the follow-up of N slides.
        groups: integer [N], from 0.
        counts: integer [N], how often each slide counts; None takes each once.

    Raises:
        ValueError: groups that are not one per slide.

    Source: Mantel, Cancer Chemotherapy Reports 50 (1966), 163; Peto and Peto, JRSS A 135 (1972), 185.
    """
    from scipy.special import chdtrc  # here, because options do not need it

    numbers = np.asarray(groups, dtype=np.int64)
    check_length("groups", numbers.shape, len(follow_up))
    weights = np.ones(len(numbers)) if counts is None else np.asarray(counts, dtype=np.float64)
    n_groups = int(numbers.max()) + 1
    members = weights * (numbers == np.arange(n_groups)[:, None])  # [G, N]
    _, at_risk, events = life_table(follow_up, members)  # [K], [G, K], [G, K]
    at_events = events.sum(axis=0) > 0
    at_risk, events = at_risk[:, at_events], events[:, at_events]
    n, d = at_risk.sum(axis=0), events.sum(axis=0)
    shares = at_risk / n
    observed, expected = events.sum(axis=1), (d * shares).sum(axis=1)
    tested = np.flatnonzero(expected > 0)
    if len(tested) < 2:
        reason = (
            "no slide has an event" if not at_events.any() else "all slides that events could come to are in one group"
        )
        return LogRank(math.nan, 0, math.nan, observed, expected, reason)
    # Of n at risk d have the event, drawn without replacement: none of the variance is left where one is at risk.
    spread = np.divide(d * (n - d), n - 1, out=np.zeros_like(d), where=n > 1)
    covariance = np.diag((spread * shares).sum(axis=1)) - (spread * shares) @ shares.T
    kept = tested[:-1]  # the last group's follows from the others'
    difference = (observed - expected)[kept]
    within = covariance[np.ix_(kept, kept)]
    if np.linalg.matrix_rank(within) < len(kept):
        return LogRank(math.nan, 0, math.nan, observed, expected, "the events leave the groups' difference no variance")
    statistic = float(difference @ np.linalg.solve(within, difference))
    return LogRank(statistic, len(kept), float(chdtrc(len(kept), statistic)), observed, expected)
