"""Percentile bootstrap over slides or patients, all resamples at once.

A resample is a vector of counts: how often each slide was drawn. Every metric is then a function of the counts: a
matrix product gives the confusion matrices, a sum over the sorted scores gives the AUC.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ds_wsi.evaluation.metrics import (
    METRIC_NAMES,
    FloatArray,
    IntArray,
    check_predictions,
    slide_metrics,
)
from ds_wsi.evaluation.weighted import (
    area_under_roc,
    confusion_counts,
    divide,
    mean_where,
    quadratic_weighted_kappa,
)
from ds_wsi.runtime.files import json_number

# An interval is a percentile bootstrap's. Where all resamples agree, as they do for twenty slides of twenty right, a
# bootstrap would give an interval of no width: the accuracy's is then exact, the others' is not told.
SAME = 1e-12  # resamples that differ by less agree: they differ by rounding
METHODS = ("bootstrap", "exact", "undetermined")
Measure = Callable[[IntArray], Mapping[str, FloatArray]]  # how often each slide counts, [R, N] -> metric -> [R]
CHUNK_ELEMENTS = 2**20  # counts held at once: 8 MiB per array, whatever the number of slides and resamples


@dataclass(frozen=True)
class MetricInterval:
    """A metric of the test slides and its interval.

    Attributes:
        value: the metric on the slides themselves; NaN where undefined.
        low, high: the interval's ends; NaN where no resample defines the metric, and where all resamples agree.
        n_resamples_used: resamples on which the metric is defined.
        confidence: the interval's level, in (0, 1).
        method: one of METHODS.
    """

    value: float
    low: float
    high: float
    n_resamples_used: int
    confidence: float = 0.95
    method: str = "bootstrap"


def bootstrap_metrics(
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    patients: Sequence[str] | None = None,
) -> dict[str, MetricInterval]:
    """Compute `slide_metrics` with an interval for each: a percentile bootstrap's wherever the resamples differ.

    Where every slide is right, or none, the accuracy's interval is Clopper and Pearson's of the number of patients,
    because slides of one patient are not independent; the other metrics' is not determined.

    Patients, each with all its slides, are drawn with replacement, as many as there are: slides of one patient are
    not independent. A resample on which a metric is undefined (one class drawn only) is left out of its interval.
    Of several runs over the slides, on other tiles of each, value and interval are of the metric's mean over the
    runs; all runs share the resamples, and the runs' tiles stay as they are. It is defined where each run's is.

    Args:
        labels: integer [N], indices of the true classes.
        probabilities: float [N, C], each row a distribution over the classes, or [R, N, C] of R runs.
        n_resamples: how many; the same seed gives the same ones.
        confidence: the interval's level, in (0, 1).
        seed: the seed of the resampling.
        patients: N names, one per slide; None takes each slide for a patient.

    Returns:
        METRIC_NAMES -> interval.

    Raises:
        ValueError: n_resamples or confidence out of range; see also `slide_metrics`.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; Clopper and Pearson, Biometrika
    26 (1934), 404.
    """
    check_resampling(n_resamples, confidence)
    probabilities = np.asarray(probabilities, dtype=np.float64)
    runs = list(probabilities) if probabilities.ndim == 3 else [probabilities]
    label_array, _ = check_predictions(labels, runs[0])
    each = [slide_metrics(label_array, run) for run in runs]
    values = {name: float(np.mean([metrics[name] for metrics in each])) for name in METRIC_NAMES}
    samples = resample_metrics(label_array, runs, patients, n_resamples, seed)
    intervals = {name: percentile_interval(values[name], samples[name], confidence) for name in METRIC_NAMES}
    if values["accuracy"] in (0.0, 1.0):
        drawn = len(label_array) if patients is None else len(set(patients))
        intervals["accuracy"] = _exact_at_an_end(values["accuracy"], drawn, intervals["accuracy"])
    return intervals


def check_resampling(n_resamples: int, confidence: float) -> None:
    """Refuse numbers that no bootstrap has."""
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}. HINT: 2000 is usual.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}. HINT: 0.95 is usual.")


def bootstrap_measures(
    measures: Sequence[Measure],
    n_slides: int,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    patients: Sequence[str] | None = None,
    shares: Collection[str] = (),
) -> dict[str, MetricInterval]:
    """Compute metrics of any task with a percentile interval for each, as `bootstrap_metrics` does of classification.

    Args:
        measures: one per run over the slides; each maps counts [R, N] to metrics [R]. All give the same metrics.
        n_slides: N.
        n_resamples, confidence, seed, patients: the same as of `bootstrap_metrics`.
        shares: the metrics that are shares of the slides, such as accuracy; at 0 or 1 their interval is the exact one.

    Returns:
        Metric -> interval, in the measures' order; the value is the mean over the runs.

    Raises:
        ValueError: n_resamples or confidence out of range, patients that are not one per slide.
    """
    check_resampling(n_resamples, confidence)
    if patients is not None and len(patients) != n_slides:
        raise ValueError(f"patients must have {n_slides} names, got {len(patients)}. HINT: give one name per slide.")
    whole = [measure(np.ones((1, n_slides), dtype=np.int64)) for measure in measures]
    samples = resample_measures(measures, n_slides, patients, n_resamples, seed)
    values = {name: float(np.mean([each[name][0] for each in whole])) for name in whole[0]}
    intervals = {name: percentile_interval(values[name], samples[name], confidence) for name in values}
    n_drawn = n_slides if patients is None else len(set(patients))
    for name in shares:
        if values[name] in (0.0, 1.0):
            intervals[name] = _exact_at_an_end(values[name], n_drawn, intervals[name])
    return intervals


def resample_metrics(
    labels: IntArray, runs: Sequence[FloatArray], patients: Sequence[str] | None, n_resamples: int, seed: int
) -> dict[str, FloatArray]:
    """Compute the mean over the runs of `slide_metrics` of each resample.

    Args:
        labels: int64 [N].
        runs: float64 [N, C] each.
        patients: one per slide, or None.
        n_resamples, seed: the same ones give the same resamples for the same patients.

    Returns:
        METRIC_NAMES -> float64 [n_resamples], NaN where any run's metric is undefined.
    """
    measures = [partial(weighted_metrics, labels, run) for run in runs]
    return resample_measures(measures, len(labels), patients, n_resamples, seed)


def resample_measures(
    measures: Sequence[Measure], n_slides: int, patients: Sequence[str] | None, n_resamples: int, seed: int
) -> dict[str, FloatArray]:
    """Compute the mean over the runs of metrics of any task of each resample.

    Args:
        measures: one per run; each maps counts, int64 [R, N], to metrics, float64 [R] by name.
        n_slides: N.
        patients, n_resamples, seed: the same as of `resample_metrics`.

    Returns:
        Metric -> float64 [n_resamples], NaN where any run's metric is undefined.
    """
    names = range(n_slides) if patients is None else patients
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}  # in the slides' order
    groups = np.array([numbers[name] for name in names])
    parts: dict[str, list[FloatArray]] = {}
    for counts in resample_counts(len(numbers), n_resamples, seed):
        each = [measure(counts[:, groups]) for measure in measures]
        for name in each[0]:
            parts.setdefault(name, []).append(np.mean([metrics[name] for metrics in each], axis=0))
    return {name: np.concatenate(values) for name, values in parts.items()}


def resample_counts(n_drawn: int, n_resamples: int, seed: int) -> Iterator[IntArray]:
    """Yield the resamples in chunks of bounded size: int64 [r, n_drawn], each row summing to n_drawn."""
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK_ELEMENTS // n_drawn)
    for start in range(0, n_resamples, rows):
        shape = (min(rows, n_resamples - start), n_drawn)
        drawn = generator.integers(n_drawn, size=shape)
        drawn += np.arange(shape[0])[:, None] * n_drawn  # a resample's own range, to count all at once
        yield np.bincount(drawn.ravel(), minlength=shape[0] * n_drawn).reshape(shape).astype(np.int64, copy=False)


def weighted_metrics(labels: IntArray, probabilities: FloatArray, counts: IntArray) -> dict[str, FloatArray]:
    """Compute `slide_metrics` of each resample.

    Args:
        labels: int64 [N].
        probabilities: float64 [N, C].
        counts: int64 [R, N], how often each resample holds each slide.

    Returns:
        METRIC_NAMES -> float64 [R], NaN where the resample leaves the metric undefined.
    """
    classes = probabilities.shape[1]
    weights = counts.astype(np.float64)  # whole numbers: sums are exact
    confusion = confusion_counts(labels, probabilities.argmax(axis=1), weights, classes)
    present = confusion.sum(axis=2) > 0  # [R, C]
    values = (
        np.trace(confusion, axis1=1, axis2=2) / weights.sum(axis=1),
        _balanced_accuracy(confusion, present),
        _auc(labels, probabilities, weights, present),
        quadratic_weighted_kappa(confusion),
        _f1(confusion),
    )
    return dict(zip(METRIC_NAMES, values, strict=True))


def _balanced_accuracy(confusion: FloatArray, present: npt.NDArray[np.bool_]) -> FloatArray:
    recall = divide(np.diagonal(confusion, axis1=1, axis2=2), confusion.sum(axis=2))
    return mean_where(recall, present & (present.sum(axis=1, keepdims=True) > 1))


def _auc(
    labels: IntArray, probabilities: FloatArray, weights: FloatArray, present: npt.NDArray[np.bool_]
) -> FloatArray:
    classes = range(1, 2) if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    areas = np.stack(
        [
            area_under_roc(probabilities[:, index], weights * (labels == index), weights * (labels != index))
            for index in classes
        ],
        axis=1,
    )
    return mean_where(areas, present[:, classes] & np.isfinite(areas))


def _f1(confusion: FloatArray) -> FloatArray:
    # 2 TP / (2 TP + FP + FN) for each class; 0 / 0 where a class occurs nowhere.
    scores = divide(
        2 * np.diagonal(confusion, axis1=1, axis2=2), confusion.sum(axis=1) + confusion.sum(axis=2)
    )  # [R, C]
    return scores[:, 1] if scores.shape[1] == 2 else mean_where(scores, np.isfinite(scores))


def percentile_interval(value: float, samples: FloatArray, confidence: float) -> MetricInterval:
    """The interval between the samples' quantiles; what is not finite is left out. Where all agree there is none."""
    defined = samples[np.isfinite(samples)]
    if not defined.size or np.ptp(defined) < SAME:
        return MetricInterval(value, math.nan, math.nan, int(defined.size), confidence, "undetermined")
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, (tail, 1 - tail))
    return MetricInterval(value, float(low), float(high), int(defined.size), confidence)


def _exact_at_an_end(value: float, count: int, interval: MetricInterval) -> MetricInterval:
    """A share of 0 or 1 among `count`: up to where none, or all, still has a probability of (1 - confidence) / 2."""
    bound = ((1 - interval.confidence) / 2) ** (1 / count)
    low, high = (bound, 1.0) if value == 1 else (0.0, 1 - bound)
    return replace(interval, low=low, high=high, method="exact")


def metrics_to_json(intervals: Mapping[str, MetricInterval]) -> dict[str, dict[str, float | int | str | None]]:
    """Return the intervals as plain values for a JSON file; what is undefined is None, since JSON has no NaN."""
    return {
        name: {
            "value": json_number(interval.value),
            "low": json_number(interval.low),
            "high": json_number(interval.high),
            "confidence": interval.confidence,
            "n_resamples_used": interval.n_resamples_used,
            "method": interval.method,
        }
        for name, interval in intervals.items()
    }


def metrics_from_json(values: Mapping[str, Mapping[str, Any]]) -> dict[str, MetricInterval]:
    """What `metrics_to_json` was given."""
    return {
        name: MetricInterval(
            value=_from_json(entry["value"]),
            low=_from_json(entry["low"]),
            high=_from_json(entry["high"]),
            n_resamples_used=int(entry["n_resamples_used"]),
            confidence=float(entry["confidence"]),
            method=str(entry.get("method", "bootstrap")),  # absent in files of earlier versions
        )
        for name, entry in values.items()
    }


def _from_json(value: float | None) -> float:
    return math.nan if value is None else float(value)


def format_table(intervals: Mapping[str, MetricInterval]) -> str:
    """Return the intervals as lines of text for a terminal."""
    if not intervals:
        return "no metrics"
    confidence = next(iter(intervals.values())).confidence
    width = max(map(len, [*intervals, "metric"]))
    lines = [f"{'metric':<{width}}   value  {100 * confidence:g}% interval"]
    for name, interval in intervals.items():
        lines.append(f"{name:<{width}}  {_number(interval.value):>6}  {_range(interval)}")
    return "\n".join(lines)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _range(interval: MetricInterval) -> str:
    return range_words(interval) or f"[{interval.low:.3f}, {interval.high:.3f}]"


def range_words(interval: MetricInterval) -> str:
    """What stands in the place of an interval that is none; "" where there is one."""
    if interval.n_resamples_used == 0:
        return "undefined"
    return "not told: all resamples agree" if math.isnan(interval.low) else ""
