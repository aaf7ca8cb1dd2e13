"""The metrics of a survival task, of its slides and of many resamples of them."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ds_wsi.evaluation.metrics import FloatArray, IntArray
from ds_wsi.evaluation.task_metrics.concordance import (
    no_pairs,
    numbered,
    uno_c_reason,
    weighted_harrell_c,
    weighted_uno_c,
)
from ds_wsi.evaluation.task_metrics.follow_up import FollowUp
from ds_wsi.evaluation.task_metrics.measured import (
    Measured,
    finite_column,
    listed,
    one_of_each,
    slide_name,
    with_reasons,
)
from ds_wsi.evaluation.task_metrics.over_time import (
    TrainingReference,
    weighted_auc_at,
    weighted_brier_at,
    weighted_ibs,
    weighted_mean_auc,
)


@dataclass(frozen=True)
class SurvivalPredictions:
    """Predictions of N slides beside their follow-up; `survival_predictions` makes checked ones.

    Attributes:
        follow_up: the slides'.
        risks: float64 [N], higher for an earlier event.
        survival: float64 [N, T], probability of no event by each of the reference's times, or None.
        strata: int64 [N], or None.
    """

    follow_up: FollowUp
    risks: FloatArray
    survival: FloatArray | None = None
    strata: IntArray | None = None


def survival_predictions(
    follow_up: FollowUp,
    risks: npt.ArrayLike,
    *,
    survival: npt.ArrayLike | None = None,
    strata: Sequence[Hashable] | None = None,
    slide_ids: Sequence[str] | None = None,
) -> SurvivalPredictions:
    """Check predictions.

    Args:
        follow_up: the follow-up of N slides.
        risks: float [N], finite.
        survival: float [N, T] in [0, 1]; NaN where the model tells none.
        strata: N names, such as centres.
        slide_ids: N names, for messages.

    Raises:
        ValueError: shapes that do not fit, a risk that is not finite, a probability outside [0, 1]; the first such
            slide is named.
    """
    n_slides = len(follow_up)
    chances = None if survival is None else np.asarray(survival, dtype=np.float64)
    if chances is not None:
        if chances.ndim != 2 or len(chances) != n_slides:
            raise ValueError(
                f"survival must have shape [{n_slides}, T], got {list(chances.shape)}. "
                "HINT: give one row per slide, one column per time."
            )
        wrong = np.argwhere((chances < 0) | (chances > 1))
        if len(wrong):
            row, column = wrong[0]
            raise ValueError(
                f"survival must lie in [0, 1], got {chances[row, column]} ({slide_name(int(row), slide_ids)}). "
                "HINT: give probabilities of no event by each time, no risks."
            )
    return SurvivalPredictions(
        follow_up,
        finite_column("risks", risks, n_slides, slide_ids),
        chances,
        numbered(strata, n_slides),
    )


@dataclass(frozen=True)
class OverTime:
    """AUC and Brier score at each of the reference's times: float64 [T] each, NaN where undefined.

    Attributes:
        times: the reference's, in the cohort's unit.
        auc: the cumulative/dynamic one.
        brier: the model's; all NaN without survival probabilities.
        brier_kaplan_meier: the training split's Kaplan-Meier curve's.
    """

    times: FloatArray
    auc: FloatArray
    brier: FloatArray
    brier_kaplan_meier: FloatArray


def survival_over_time(predictions: SurvivalPredictions, reference: TrainingReference) -> OverTime:
    """Compute what changes with the time.

    Raises:
        ValueError: survival probabilities that are not one per time of the reference.
    """
    once = one_of_each(len(predictions.follow_up))
    areas, brier, of_curve = _at_times(predictions, reference, once)
    missing = np.full(len(reference.times), np.nan)
    return OverTime(reference.times, areas[0], missing if brier is None else brier[0], of_curve[0])


def survival_metrics(
    predictions: SurvivalPredictions, reference: TrainingReference | None = None
) -> dict[str, Measured]:
    """Compute the metrics of a set of slides.

    Args:
        predictions: see `survival_predictions`.
        reference: the training split's; None leaves all but C undefined.

    Returns:
        The names of METRICS["survival"] -> value; c_index_stratified only where there are strata, all with reasons
        where the slides leave them undefined.

    Raises:
        ValueError: survival probabilities that are not one per time of the reference.
    """
    values = weighted_survival_metrics(predictions, reference, one_of_each(len(predictions.follow_up)))
    reasons = {name: "" for name in values} | _reasons(predictions, reference, values)
    return with_reasons(values, reasons)


def weighted_survival_metrics(
    predictions: SurvivalPredictions, reference: TrainingReference | None, counts: IntArray
) -> dict[str, FloatArray]:
    """Compute the metrics of each resample; the training split is not resampled.

    Args:
        predictions, reference: see `survival_metrics`.
        counts: integer or float [R, N], how often each resample holds each slide.

    Returns:
        The same names as `survival_metrics` -> float64 [R], NaN where undefined.
    """
    of, risks = predictions.follow_up, predictions.risks
    values = {"c_index": weighted_harrell_c(of, risks, counts)}
    if reference is None:
        undefined = np.full(len(counts), np.nan)
        values |= {name: undefined.copy() for name in ("uno_c", "auc_t", "ibs", "ibs_kaplan_meier")}
    else:
        areas, brier, of_curve = _at_times(predictions, reference, counts)
        values["uno_c"] = weighted_uno_c(of, risks, counts, reference.censoring, reference.tau)
        values["auc_t"] = weighted_mean_auc(areas, of, reference, counts)
        values["ibs"] = np.full(len(counts), np.nan) if brier is None else weighted_ibs(brier, reference.times)
        values["ibs_kaplan_meier"] = weighted_ibs(of_curve, reference.times)
    if predictions.strata is not None:
        values["c_index_stratified"] = weighted_harrell_c(of, risks, counts, predictions.strata)
    return values


def _at_times(
    predictions: SurvivalPredictions, reference: TrainingReference, counts: IntArray
) -> tuple[FloatArray, FloatArray | None, FloatArray]:
    """AUC, Brier score and that of the Kaplan-Meier curve: float64 [R, T] each."""
    of, n_times = predictions.follow_up, len(reference.times)
    if predictions.survival is not None and predictions.survival.shape[1] != n_times:
        raise ValueError(
            f"survival must have one column per time of the reference, {n_times}, got {predictions.survival.shape[1]}. "
            "HINT: evaluate the model's survival function at reference.times."
        )
    same = np.broadcast_to(reference.survival.at(reference.times), (len(of), n_times))
    brier = None
    if predictions.survival is not None:
        brier = weighted_brier_at(of, predictions.survival, reference, counts)
    return (
        weighted_auc_at(of, predictions.risks, reference, counts),
        brier,
        weighted_brier_at(of, same, reference, counts),
    )


def _reasons(
    predictions: SurvivalPredictions, reference: TrainingReference | None, values: dict[str, FloatArray]
) -> dict[str, str]:
    """Say of each metric why it is undefined, or what was left out of it."""
    of = predictions.follow_up
    undefined = {name for name, value in values.items() if np.isnan(value[0])}
    reasons: dict[str, str] = {}
    for name in undefined & {"c_index", "c_index_stratified"}:
        reasons[name] = no_pairs(of, stratified=name != "c_index")
    if reference is None:
        return reasons | {name: "the training split's follow-up is not known" for name in undefined - reasons.keys()}
    reasons["uno_c"] = uno_c_reason(of, reference.censoring, reference.tau, defined="uno_c" not in undefined)
    at_times = survival_over_time(predictions, reference)
    without = _shown(reference.times[np.isnan(at_times.auc)])
    if not len(reference.times):
        reasons["auc_t"] = reasons["ibs"] = reasons["ibs_kaplan_meier"] = "no slide of the training split has an event"
        return reasons
    if without:
        reasons["auc_t"] = f"left out: the times {without}, with no case, no control or no G(t) above 0"
    elif "auc_t" in undefined:
        reasons["auc_t"] = "no event falls between the times"
    for name, scores in (("ibs", at_times.brier), ("ibs_kaplan_meier", at_times.brier_kaplan_meier)):
        if name in undefined:
            reasons[name] = _why_no_ibs(reference, scores, name == "ibs" and predictions.survival is None)
    return reasons


def _why_no_ibs(reference: TrainingReference, scores: FloatArray, no_probabilities: bool) -> str:
    if no_probabilities:
        return "the model tells no survival probabilities"
    missing = reference.times[np.isnan(scores)]
    if not missing.size:
        return "an integral needs two times"
    return f"no Brier score at the times {_shown(missing)}: G(t) is not above 0, or no probability is told"


def _shown(times: FloatArray) -> str:
    return listed(f"{time:g}" for time in times)
