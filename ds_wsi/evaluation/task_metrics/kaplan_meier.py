"""Kaplan and Meier's estimator: curves with intervals, of censoring too, and the curves of many resamples at once.

Events come before the censoring of the same time: who is censored at t was at risk of the event at t, and who has the
event at t was not at risk of being censored then.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from ds_wsi.evaluation.metrics import FloatArray, IntArray
from ds_wsi.evaluation.task_metrics.follow_up import FollowUp
from ds_wsi.evaluation.weighted import divide

ROUNDING = 1e-12  # what a product of shares may miss one half by


@dataclass(frozen=True)
class StepCurve:
    """A survival function: 1 before the first time, then the value of the last time that has come.

    Attributes:
        times: float64 [K], ascending, each once.
        values: float64 [K], falling.
    """

    times: FloatArray
    values: FloatArray

    def at(self, times: npt.ArrayLike) -> FloatArray:
        """Return the values at times of any shape; NaN beyond the last time, unless the curve has come to 0 there."""
        asked = np.asarray(times, dtype=np.float64)
        steps = np.concatenate([[1.0], self.values])[np.searchsorted(self.times, asked, side="right")]
        end = self.times[-1] if len(self.times) else -np.inf
        return np.where((asked > end) & (steps > 0), np.nan, steps)


@dataclass(frozen=True)
class SurvivalCurve:
    """A Kaplan-Meier curve; all arrays are float64 [K], one value per distinct time.

    Attributes:
        times: those of events and of censoring, ascending.
        at_risk: slides whose follow-up is not shorter.
        events, censored: slides at the time.
        survival: just after the time.
        low, high: the interval's ends; NaN where the curve is 0, which leaves no variance.
        confidence: the interval's level, in (0, 1).
    """

    times: FloatArray
    at_risk: FloatArray
    events: FloatArray
    censored: FloatArray
    survival: FloatArray
    low: FloatArray
    high: FloatArray
    confidence: float

    @property
    def steps(self) -> StepCurve:
        """The curve alone."""
        return StepCurve(self.times, self.survival)

    @property
    def median(self) -> float:
        """The first time at which half of the slides, or fewer, have had no event; NaN where it does not come."""
        below = np.flatnonzero(self.survival <= 0.5 + ROUNDING)
        return float(self.times[below[0]]) if below.size else math.nan

    def at_risk_at(self, times: npt.ArrayLike) -> FloatArray:
        """Return how many slides have a follow-up of at least each of the times [T]: float64 [T]."""
        places = np.searchsorted(self.times, np.asarray(times, dtype=np.float64), side="left")
        return np.append(self.at_risk, 0.0)[places]


def kaplan_meier(
    follow_up: FollowUp, counts: npt.ArrayLike | None = None, *, confidence: float = 0.95
) -> SurvivalCurve:
    """Estimate a survival curve with Greenwood's variance and intervals on the scale of log(-log S).

    Args:
        follow_up: the follow-up of N slides.
        counts: integer or float [N], how often each counts; None takes each once.
        confidence: the intervals' level, in (0, 1).

    Raises:
        ValueError: confidence out of range.

    Source: Kaplan and Meier, JASA 53 (1958), 457; Kalbfleisch and Prentice, The Statistical Analysis of Failure Time
    Data, 2nd edition (2002), section 1.4.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}. HINT: 0.95 is usual.")
    weights = np.ones(len(follow_up)) if counts is None else np.asarray(counts, dtype=np.float64)
    drawn = weights > 0
    times, at_risk, events = life_table(follow_up.rows(drawn), weights[None, drawn])
    risk, event = at_risk[0], events[0]
    censored = risk - event - np.append(risk[1:], 0.0)
    survival = np.cumprod(1 - event / risk)
    low, high = _log_log_interval(survival, np.cumsum(divide(event, risk * (risk - event))), confidence)
    return SurvivalCurve(times, risk, event, censored, survival, low, high, confidence)


def _log_log_interval(survival: FloatArray, greenwood: FloatArray, confidence: float) -> tuple[FloatArray, FloatArray]:
    """The ends for each point; before the first event both are 1."""
    inside = (survival > 0) & (survival < 1)
    log_survival = np.log(survival, out=np.full_like(survival, -1.0), where=inside)
    width = NormalDist().inv_cdf((1 + confidence) / 2) * np.sqrt(np.where(inside, greenwood, 0.0)) / log_survival
    at_ends = np.where(survival > 0, survival, np.nan)
    # The width is negative: exp(-width) > 1 lowers the curve.
    low = np.where(inside, survival ** np.exp(-width), at_ends)
    high = np.where(inside, survival ** np.exp(width), at_ends)
    return low, high


def censoring_curve(follow_up: FollowUp) -> StepCurve:
    """Estimate G(t), the probability of not being censored up to t.

    Source: Uno et al., Statistics in Medicine 30 (2011), 1105, section 2.
    """
    times, at_risk, events = life_table(follow_up, np.ones((1, len(follow_up))))
    exposed = at_risk[0] - events[0]
    censored = exposed - np.append(at_risk[0, 1:], 0.0)
    return StepCurve(times, np.asarray(np.cumprod(1 - _shares(censored, exposed)), dtype=np.float64))


def weighted_survival_at(follow_up: FollowUp, counts: IntArray | FloatArray, times: FloatArray) -> FloatArray:
    """Return the Kaplan-Meier curve of each resample at some times.

    Args:
        follow_up: the follow-up of N slides.
        counts: integer or float [R, N].
        times: float64 [T].

    Returns:
        Float64 [R, T]; beyond a resample's last time the curve's last value.
    """
    distinct, at_risk, events = life_table(follow_up, np.asarray(counts, dtype=np.float64))
    curves = np.cumprod(1 - _shares(events, at_risk), axis=1)
    steps = np.concatenate([np.ones((len(curves), 1)), curves], axis=1)
    return steps[:, np.searchsorted(distinct, times, side="right")]


def _shares(numbers: FloatArray, exposed: FloatArray) -> FloatArray:
    """The shares of those exposed; 0 where nobody is."""
    return np.divide(numbers, exposed, out=np.zeros(exposed.shape), where=exposed > 0)


def life_table(follow_up: FollowUp, weights: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Count who is at risk and who has the event.

    Args:
        follow_up: the follow-up of N slides.
        weights: float64 [R, N].

    Returns:
        Float64 [K] the distinct times, ascending, and of each row of weights those at risk and the events, [R, K].
    """
    order = np.argsort(follow_up.times, kind="stable")
    distinct, firsts = np.unique(follow_up.times[order], return_index=True)
    ordered = weights[:, order]
    leaving = np.add.reduceat(ordered, firsts, axis=1)
    events = np.add.reduceat(ordered * follow_up.events[order], firsts, axis=1)
    at_risk = np.cumsum(leaving[:, ::-1], axis=1)[:, ::-1]
    return distinct, at_risk, events
