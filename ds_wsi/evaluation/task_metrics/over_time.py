"""Discrimination and calibration at given times: cumulative/dynamic AUC, Brier score, their summaries over the times.

Who is censored before a time is neither case nor control there; the others carry weights that make up for it, from the
training split's G(t), the probability of not being censored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ds_wsi.evaluation.metrics import FloatArray, IntArray
from ds_wsi.evaluation.task_metrics.follow_up import FollowUp, default_times
from ds_wsi.evaluation.task_metrics.kaplan_meier import StepCurve, censoring_curve, kaplan_meier, weighted_survival_at
from ds_wsi.evaluation.weighted import area_under_roc, divide


@dataclass(frozen=True)
class TrainingReference:
    """What the metrics of a survival task take from the training split; kept with a model, it serves every cohort.

    Attributes:
        censoring: G(t), see `censoring_curve`.
        survival: the Kaplan-Meier curve, which predicts the same for every slide.
        times: float64 [T], ascending, at which AUC and Brier score are taken, in the cohort's unit.
        tau: the one of Uno's C; None takes all of the training follow-up.
    """

    censoring: StepCurve
    survival: StepCurve
    times: FloatArray
    tau: float | None = None


def training_reference(
    training: FollowUp, times: FloatArray | None = None, tau: float | None = None
) -> TrainingReference:
    """Take from the training split what the metrics need.

    Args:
        training: the follow-up of the training split.
        times: float [T]; None takes `default_times`. Equal ones are merged.
        tau: see `TrainingReference`.

    Raises:
        ValueError: times that are no list of finite numbers, a tau that is not above 0.
    """
    asked = default_times(training) if times is None else np.unique(np.asarray(times, dtype=np.float64))
    if asked.ndim != 1 or not np.isfinite(asked).all():
        raise ValueError(
            f"times must be finite numbers [T], got {asked.tolist()}. HINT: give them in the cohort's unit."
        )
    if tau is not None and not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}. HINT: it is a time in the cohort's unit.")
    return TrainingReference(censoring_curve(training), kaplan_meier(training).steps, asked, tau)


def reference_to_json(reference: TrainingReference) -> dict[str, Any]:
    """Return plain values for a JSON file: `reference_from_json` has the same bits again."""
    return {
        "censoring": {"times": reference.censoring.times.tolist(), "values": reference.censoring.values.tolist()},
        "survival": {"times": reference.survival.times.tolist(), "values": reference.survival.values.tolist()},
        "times": reference.times.tolist(),
        "tau": reference.tau,
    }


def reference_from_json(values: Mapping[str, Any]) -> TrainingReference:
    """Return what `reference_to_json` was given.

    Raises:
        ValueError: an entry is missing, or no list of numbers.
    """
    try:
        censoring, survival = (
            StepCurve(*(np.array(values[name][part], dtype=np.float64) for part in ("times", "values")))
            for name in ("censoring", "survival")
        )
        times = np.array(values["times"], dtype=np.float64)
        tau = None if values["tau"] is None else float(values["tau"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"a training reference must have censoring, survival, times and tau as numbers, got {error!r}. "
            "HINT: it is written by reference_to_json."
        ) from error
    return TrainingReference(censoring, survival, times, tau)


def weighted_auc_at(
    follow_up: FollowUp, risks: FloatArray, reference: TrainingReference, counts: IntArray | FloatArray
) -> FloatArray:
    """Compute the cumulative/dynamic AUC(t) of each resample.

    Cases have had the event by t and weigh 1 / G(T_i); controls are followed beyond t.

    Args:
        follow_up: the follow-up of N slides.
        risks: float64 [N], higher for an earlier event.
        reference: the training split's.
        counts: integer or float [R, N].

    Returns:
        Float64 [R, T], NaN where there is no case or no control, or where G is not above 0 at a case.

    Source: Uno et al., JASA 102 (2007), 527, section 3; Hung and Chiang, Canadian Journal of Statistics 38 (2010), 8.
    """
    weights = np.asarray(counts, dtype=np.float64)
    at_own_time = np.nan_to_num(reference.censoring.at(follow_up.times))
    inverse = np.divide(1.0, at_own_time, out=np.zeros_like(at_own_time), where=at_own_time > 0)
    columns = []
    for time in reference.times:
        cases = follow_up.events & (follow_up.times <= time)
        area = area_under_roc(risks, weights * (cases * inverse), weights * (follow_up.times > time))
        area[weights @ (cases & (inverse == 0)) > 0] = np.nan
        columns.append(area)
    return np.stack(columns, axis=1) if columns else np.empty((len(weights), 0))


def weighted_mean_auc(
    areas: FloatArray, follow_up: FollowUp, reference: TrainingReference, counts: IntArray | FloatArray
) -> FloatArray:
    """Average the AUC over the times, each weighted by the drop of the resample's Kaplan-Meier curve up to it.

    Args:
        areas: float64 [R, T], of `weighted_auc_at`; times at which it is undefined are left out.
        follow_up, reference, counts: the same as there.

    Returns:
        Float64 [R], NaN where no time is left, or where no event falls between those left.

    Source: Lambert and Chevret, Statistical Methods in Medical Research 25 (2016), 2088, equation 6.
    """
    survival = weighted_survival_at(follow_up, counts, reference.times)
    # An AUC is undefined before the first case, where nothing drops, or from some time on: no drop is between.
    drops = np.where(np.isfinite(areas), -np.diff(survival, axis=1, prepend=1.0), 0.0)
    return divide((drops * np.nan_to_num(areas)).sum(axis=1), drops.sum(axis=1))


def weighted_brier_at(
    follow_up: FollowUp, survival: FloatArray, reference: TrainingReference, counts: IntArray | FloatArray
) -> FloatArray:
    """Compute the Brier score at each time of each resample: 0.25 is a coin's, 0 a prophet's.

    Args:
        follow_up: the follow-up of N slides.
        survival: float64 [N, T], predicted probability of no event by each of the reference's times; NaN where the
            model tells none.
        reference: the training split's.
        counts: integer or float [R, N].

    Returns:
        Float64 [R, T], NaN where G has no value above 0 or the model no probability for a slide that is needed.

    Source: Graf et al., Statistics in Medicine 18 (1999), 2529, equation 7.
    """
    weights = np.asarray(counts, dtype=np.float64)
    total = weights.sum(axis=1)
    columns = []
    for column in range(len(reference.times)):
        errors = _brier_terms(follow_up, survival, reference, column)
        undefined = np.isnan(errors)
        score = divide(weights @ np.where(undefined, 0.0, errors), total)
        score[weights @ undefined > 0] = np.nan
        columns.append(score)
    return np.stack(columns, axis=1) if columns else np.empty((len(weights), 0))


def _brier_terms(follow_up: FollowUp, survival: FloatArray, reference: TrainingReference, column: int) -> FloatArray:
    """Each slide's weighted squared error at one time: float64 [N]."""
    time = reference.times[column]
    chance = survival[:, column]
    cases = follow_up.events & (follow_up.times <= time)
    controls = follow_up.times > time
    squared = np.where(cases, chance**2, (1 - chance) ** 2)
    g = reference.censoring.at(np.minimum(follow_up.times, time))
    weighted = np.divide(squared, g, out=np.full_like(squared, np.nan), where=g > 0)
    return np.where(cases | controls, weighted, 0.0)


def weighted_ibs(scores: FloatArray, times: FloatArray) -> FloatArray:
    """Integrate Brier scores over their times by trapezoids, over the range of the times.

    Args:
        scores: float64 [R, T], of `weighted_brier_at`.
        times: float64 [T], ascending.

    Returns:
        Float64 [R], NaN where a score is, and with fewer than two times.
    """
    if len(times) < 2:
        return np.full(len(scores), np.nan)
    middle = (scores[:, 1:] + scores[:, :-1]) / 2
    return np.asarray((middle * np.diff(times)).sum(axis=1) / (times[-1] - times[0]))
