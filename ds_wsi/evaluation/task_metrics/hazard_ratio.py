"""The hazard ratio of one covariate: Cox's model with one coefficient, by Newton's method."""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from ds_wsi.evaluation.metrics import FloatArray, IntArray
from ds_wsi.evaluation.task_metrics.follow_up import FollowUp
from ds_wsi.evaluation.task_metrics.measured import check_length, finite_column

MAX_STEPS = 60
CONVERGED = 1e-18  # the square of how many standard errors the coefficient may be off by


@dataclass(frozen=True)
class HazardRatio:
    """A hazard ratio per unit of a covariate; all numbers are NaN where it is undefined.

    Attributes:
        ratio: exp of the coefficient.
        low, high: Wald's interval.
        p_value: Wald's, two-sided.
        coefficient, standard_error: those of Cox's model.
        confidence: the interval's level, in (0, 1).
        reason: why it is undefined; "" where it is not.
    """

    ratio: float
    low: float
    high: float
    p_value: float
    coefficient: float
    standard_error: float
    confidence: float
    reason: str = ""


@dataclass(frozen=True)
class _Terms:
    """What each event, in the order of the times, sums over.

    Attributes:
        covariate: float64 [N], longest follow-up first.
        of_events: float64 [E], the events' covariates, in the same order.
        risk_end: int64 [E], how many slides, from the first, are at risk at the event.
        tied_starts: int64 [K], where the events of each distinct time begin; time_of: int64 [E], which time is whose.
        share: float64 [E], the part of the tied events' hazards that Efron takes out.
    """

    covariate: FloatArray
    of_events: FloatArray
    risk_end: IntArray
    tied_starts: IntArray
    time_of: IntArray
    share: FloatArray


def hazard_ratio(
    follow_up: FollowUp,
    covariate: npt.ArrayLike,
    counts: npt.ArrayLike | None = None,
    *,
    ties: Literal["efron", "breslow"] = "efron",
    confidence: float = 0.95,
) -> HazardRatio:
    """Estimate the hazard ratio per unit of one covariate, such as 1 for the high-risk group and 0 for the low.

    Args:
        follow_up: the follow-up of N slides.
        covariate: float [N].
        counts: integer [N], how often each slide counts; None takes each once.
        ties: how events of the same time are taken.
        confidence: the interval's level, in (0, 1).

    Raises:
        ValueError: shapes that do not fit, a covariate that is not finite, counts that are no whole numbers, another
            way of ties, confidence out of range.

    Source: Cox, JRSS B 34 (1972), 187; Efron, JASA 72 (1977), 557.
    """
    if ties not in ("efron", "breslow"):
        raise ValueError(f"ties must be efron or breslow, got {ties!r}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}. HINT: 0.95 is usual.")
    values = finite_column("covariate", covariate, len(follow_up))
    if counts is not None:
        rows = _written_out(counts, len(follow_up))
        follow_up, values = follow_up.rows(rows), values[rows]
    reason = _why_undefined(follow_up, values)
    if reason:
        return undefined_ratio(confidence, reason)
    # On the scale of its standard deviation Newton's steps have one size, whatever the covariate's unit.
    centre, scale = float(values.mean()), float(values.std())
    coefficient, information = _maximum(_terms(follow_up, (values - centre) / scale, ties))
    coefficient, error = coefficient / scale, 1 / (math.sqrt(information) * scale)
    width = NormalDist().inv_cdf((1 + confidence) / 2) * error
    p_value = math.erfc(abs(coefficient / error) / math.sqrt(2))
    ends = (_exp(coefficient - width), _exp(coefficient + width))
    return HazardRatio(_exp(coefficient), *ends, p_value, coefficient, error, confidence)


def undefined_ratio(confidence: float, reason: str) -> HazardRatio:
    """Return a hazard ratio that is none, and why."""
    missing = math.nan
    return HazardRatio(missing, missing, missing, missing, missing, missing, confidence, reason)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _written_out(counts: npt.ArrayLike, n_slides: int) -> IntArray:
    """Return the slides' rows as often as they count: Efron's ties depend on each."""
    numbers = np.asarray(counts)
    check_length("counts", numbers.shape, n_slides)
    if (numbers < 0).any() or (numbers != np.floor(numbers)).any() or not numbers.any():
        raise ValueError("counts must be whole numbers, not negative and not all 0. HINT: they are a resample's.")
    return np.repeat(np.arange(n_slides), numbers.astype(np.int64))


def _why_undefined(follow_up: FollowUp, values: FloatArray) -> str:
    """Find what leaves the likelihood without a maximum, or flat."""
    if not follow_up.events.any():
        return "no slide has an event"
    order = np.argsort(-follow_up.times, kind="stable")
    times = follow_up.times[order]
    ends = np.searchsorted(-times, -times, side="right") - 1  # the last slide still at risk
    highest, lowest = np.maximum.accumulate(values[order])[ends], np.minimum.accumulate(values[order])[ends]
    events = follow_up.events[order]
    if (highest == lowest)[events].all():
        return "all slides at risk have the same covariate at each event"
    for extreme, word in ((highest, "highest"), (lowest, "lowest")):
        if (values[order] == extreme)[events].all():
            return f"each event comes to the {word} covariate at risk: the likelihood has no maximum"
    return ""


def _terms(follow_up: FollowUp, covariate: FloatArray, ties: str) -> _Terms:
    # Events of one time stand together, longest follow-up first.
    order = np.lexsort((~follow_up.events, -follow_up.times))
    times, events = follow_up.times[order], follow_up.events[order]
    rows = np.flatnonzero(events)
    starts, time_of, sizes = np.unique(-times[rows], return_index=True, return_inverse=True, return_counts=True)[1:]
    turn = np.arange(len(rows)) - starts[time_of]  # among the events of the same time
    share = turn / sizes[time_of] if ties == "efron" else np.zeros(len(rows))
    risk_end = np.searchsorted(-times, -times[rows], side="right")
    return _Terms(covariate[order], covariate[order][rows], risk_end, starts, time_of, share)


def _maximum(terms: _Terms) -> tuple[float, float]:
    """Climb to the maximum of the partial likelihood: the coefficient and the information there."""
    coefficient = 0.0
    value, slope, information = _likelihood(terms, coefficient)
    for _ in range(MAX_STEPS):
        if slope * slope <= CONVERGED * information:
            break
        step = slope / information
        for _ in range(MAX_STEPS):
            risen = _likelihood(terms, coefficient + step)
            if math.isfinite(risen[0]) and risen[0] >= value - 1e-12 * abs(value):
                break
            step /= 2  # the likelihood is concave: a shorter step rises
        coefficient += step
        value, slope, information = risen
    return coefficient, information


def _likelihood(terms: _Terms, coefficient: float) -> tuple[float, float, float]:
    """Return the partial likelihood's logarithm, its slope and its negative curvature.

    Not finite where a step went so far that the hazards of all at risk vanish beside the highest.
    """
    exponents = coefficient * terms.covariate
    shift = exponents.max()
    hazards = np.exp(exponents - shift)
    of_events = np.exp(coefficient * terms.of_events - shift)
    sums = []
    for power in range(3):
        at_risk = np.cumsum(hazards * terms.covariate**power)[terms.risk_end - 1]
        tied = np.add.reduceat(of_events * terms.of_events**power, terms.tied_starts)[terms.time_of]
        sums.append(at_risk - terms.share * tied)
    if not (sums[0] > 0).all():
        return -math.inf, math.nan, math.nan
    mean = sums[1] / sums[0]
    value = float((coefficient * terms.of_events - shift - np.log(sums[0])).sum())
    return value, float((terms.of_events - mean).sum()), float((sums[2] / sums[0] - mean**2).sum())
