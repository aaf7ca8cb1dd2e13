"""Harrell's and Uno's C: the fraction of comparable pairs of slides whose risks are in the order of their events.

A pair is comparable where the event of the one came before the end of the other's follow-up: d_i = 1 and T_i < T_j, or
T_i = T_j and d_j = 0. Equal risks count one half.
"""

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from ds_wsi.evaluation.metrics import FloatArray, IntArray
from ds_wsi.evaluation.task_metrics.follow_up import FollowUp
from ds_wsi.evaluation.task_metrics.kaplan_meier import StepCurve
from ds_wsi.evaluation.task_metrics.measured import Measured, check_length, finite_column, one_of_each
from ds_wsi.evaluation.weighted import BoolArray, divide
from ds_wsi.runtime.words import counted

PAIRS = 2**20  # held at once: 8 MiB, whatever the number of slides


def harrell_c(follow_up: FollowUp, risks: npt.ArrayLike, *, strata: Sequence[Hashable] | None = None) -> Measured:
    """Compute Harrell's C, stratified where strata are given.

    Args:
        follow_up: the follow-up of N slides.
        risks: float [N], higher for an earlier event.
        strata: N names, such as centres; pairs of different strata are not compared.

    Raises:
        ValueError: risks that do not fit or are not finite, strata that are not one per slide.

    Source: Harrell, Lee and Mark, Statistics in Medicine 15 (1996), 361, section 5.5.
    """
    risk_column = finite_column("risks", risks, len(follow_up))
    value = weighted_harrell_c(follow_up, risk_column, one_of_each(len(follow_up)), numbered(strata, len(follow_up)))
    return Measured(float(value[0]), "" if np.isfinite(value[0]) else no_pairs(follow_up, strata is not None))


def harrell_c_per_stratum(
    follow_up: FollowUp, risks: npt.ArrayLike, strata: Sequence[Hashable]
) -> dict[Hashable, Measured]:
    """Compute Harrell's C of each stratum's slides alone: stratum -> C, in the order in which they first come.

    Raises:
        ValueError: see `harrell_c`.
    """
    risk_column = finite_column("risks", risks, len(follow_up))
    numbers = numbered(strata, len(follow_up))
    assert numbers is not None
    return {
        name: harrell_c(follow_up.rows(numbers == number), risk_column[numbers == number])
        for number, name in enumerate(dict.fromkeys(strata))
    }


def weighted_harrell_c(
    follow_up: FollowUp, risks: FloatArray, counts: IntArray | FloatArray, strata: IntArray | None = None
) -> FloatArray:
    """Compute Harrell's C of each resample.

    Args:
        follow_up: the follow-up of N slides.
        risks: float64 [N].
        counts: integer or float [R, N]; a pair counts as often as the product of its slides'.
        strata: int64 [N], or None.

    Returns:
        Float64 [R], NaN where no pair is comparable.
    """
    return _weighted_c(follow_up, risks, counts, follow_up.events.astype(np.float64), strata)


def uno_c(follow_up: FollowUp, risks: npt.ArrayLike, censoring: StepCurve, *, tau: float | None = None) -> Measured:
    """Compute Uno's C: pairs are weighted by 1 / G(T_i)^2, events from tau on are left out.

    Args:
        follow_up: the follow-up of N slides.
        risks: float [N], higher for an earlier event.
        censoring: G of the training split, see `censoring_curve`.
        tau: a time in the cohort's unit; None takes all events at which G is above 0 within the training follow-up.

    Raises:
        ValueError: risks that do not fit or are not finite.

    Source: Uno et al., Statistics in Medicine 30 (2011), 1105, equation 6.
    """
    risk_column = finite_column("risks", risks, len(follow_up))
    value = weighted_uno_c(follow_up, risk_column, one_of_each(len(follow_up)), censoring, tau)
    return Measured(float(value[0]), uno_c_reason(follow_up, censoring, tau, defined=bool(np.isfinite(value[0]))))


def weighted_uno_c(
    follow_up: FollowUp,
    risks: FloatArray,
    counts: IntArray | FloatArray,
    censoring: StepCurve,
    tau: float | None = None,
) -> FloatArray:
    """Compute Uno's C of each resample; G is the training split's, which is not resampled.

    Args:
        follow_up, censoring, tau: see `uno_c`.
        risks: float64 [N].
        counts: integer or float [R, N].

    Returns:
        Float64 [R], NaN where no pair is comparable, or where a resample holds an event before tau at which G is 0.
    """
    used, without_g = _events_before(follow_up, censoring, tau)
    weights = np.where(used, divide(np.ones(len(used)), np.where(used, censoring.at(follow_up.times), 0.0) ** 2), 0.0)
    values = _weighted_c(follow_up, risks, counts, weights, None)
    values[np.asarray(counts, dtype=np.float64) @ without_g > 0] = np.nan
    return values


def uno_c_reason(follow_up: FollowUp, censoring: StepCurve, tau: float | None, *, defined: bool) -> str:
    """Say why Uno's C is undefined, or which events it leaves out; "" where it needs no word."""
    used, without_g = _events_before(follow_up, censoring, tau)
    beyond = follow_up.events & ~used
    if without_g.any():
        return (
            f"an event at {follow_up.times[without_g].min():g} lies before tau = {tau:g}, where the training split's "
            "censoring leaves G(t) no value above 0: give an earlier tau"
        )
    if not used.any():
        return "no event lies before tau within the training split's follow-up"
    if not defined:
        return no_pairs(FollowUp(follow_up.times, used), stratified=False)
    if tau is None and beyond.any():
        first = follow_up.times[beyond].min()
        return f"left out: {counted(int(beyond.sum()), 'event')} from {first:g} on, beyond the training split's G(t)"
    return ""


def no_pairs(follow_up: FollowUp, stratified: bool) -> str:
    """Say why no pair is comparable."""
    if not follow_up.events.any():
        return "no slide has an event"
    where = " of one stratum" if stratified else ""
    return f"no pair of slides{where} is comparable: nobody was followed for longer than the first event"


def numbered(strata: Sequence[Hashable] | None, n_slides: int) -> IntArray | None:
    """Number the strata in the order in which they first come: int64 [N].

    Raises:
        ValueError: strata that are not one per slide.
    """
    if strata is None:
        return None
    check_length("strata", (len(strata),), n_slides)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(strata))}
    return np.array([numbers[name] for name in strata], dtype=np.int64)


def _events_before(follow_up: FollowUp, censoring: StepCurve, tau: float | None) -> tuple[BoolArray, BoolArray]:
    """Events that have a weight, and those before a tau that was asked for at which G has no value above 0."""
    has_g = np.nan_to_num(censoring.at(follow_up.times)) > 0
    before = follow_up.events & (follow_up.times < (np.inf if tau is None else tau))
    return before & has_g, before & ~has_g & (tau is not None)


def _weighted_c(
    follow_up: FollowUp,
    risks: FloatArray,
    counts: IntArray | FloatArray,
    event_weights: FloatArray,
    strata: IntArray | None,
) -> FloatArray:
    """Sum over pairs by blocks of events: a matrix product has the slides that each event is compared with."""
    weights = np.asarray(counts, dtype=np.float64)  # [R, N]
    concordant, comparable = np.zeros(len(weights)), np.zeros(len(weights))
    events = np.flatnonzero(event_weights)
    n_rows = max(1, PAIRS // len(risks))
    for start in range(0, len(events), n_rows):
        block = events[start : start + n_rows]  # [B]
        pairs = _comparable(follow_up, block, strata).astype(np.float64)  # [B, N]
        of_event = weights[:, block] * event_weights[block]  # [R, B]
        comparable += (of_event * (weights @ pairs.T)).sum(axis=1)
        pairs *= (1 + np.sign(risks[block, None] - risks)) / 2
        concordant += (of_event * (weights @ pairs.T)).sum(axis=1)
    return divide(concordant, comparable)


def _comparable(follow_up: FollowUp, block: IntArray, strata: IntArray | None) -> BoolArray:
    """Whether each event [B] came before the end of each slide's follow-up [N]."""
    of_events = follow_up.times[block, None]
    pairs: BoolArray = (follow_up.times > of_events) | ((follow_up.times == of_events) & ~follow_up.events)
    return pairs if strata is None else pairs & (strata == strata[block, None])
