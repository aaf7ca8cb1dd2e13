"""The metrics of each kind of task: which way is better, their range, and which one chooses the epoch.

Nothing but names and numbers, so that options can read it without loading what computes them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ds_wsi.evaluation.task_metrics.measured import Measured, listed


@dataclass(frozen=True)
class Metric:
    """A metric of one kind of task.

    Attributes:
        name: the word of options and files.
        higher_is_better: the direction; None where the number describes the slides, not the model.
        low, high: the ends of its range, both included where they are finite.
        sentence: what it is.
    """

    name: str
    higher_is_better: bool | None
    low: float
    high: float
    sentence: str


def _up(name: str, sentence: str, low: float = 0.0, high: float = 1.0) -> Metric:
    return Metric(name, True, low, high, sentence)


def _down(name: str, sentence: str) -> Metric:
    return Metric(name, False, 0.0, math.inf, sentence)


# Kind of task -> its metrics; the first chooses the epoch where nothing else is asked for.
METRICS: Mapping[str, tuple[Metric, ...]] = {
    "classification": (
        _up("auc", "Area under the ROC curve; of more than two classes the mean of one against the rest."),
        _up("accuracy", "Fraction of slides predicted right."),
        _up("balanced_accuracy", "Mean recall over the classes present."),
        _up("quadratic_weighted_kappa", "Agreement beyond chance, errors weighted by their squared distance.", -1.0),
        _up("f1", "Harmonic mean of precision and recall; of more than two classes their mean."),
    ),
    "regression": (
        _up("pearson", "Linear correlation of predictions and targets.", -1.0),
        _up("spearman", "Correlation of the ranks of predictions and targets.", -1.0),
        _up("r2", "Share of the targets' variance that the predictions explain; the mean's is 0.", -math.inf),
        _down("mae", "Mean absolute error, in the target's unit."),
        _down("rmse", "Root of the mean squared error, in the target's unit."),
    ),
    "ordinal": (
        _up("quadratic_weighted_kappa", "Agreement beyond chance, errors weighted by their squared distance.", -1.0),
        _up("accuracy", "Fraction of slides whose grade is predicted right."),
        _down("mae", "Mean absolute error, in grades."),
    ),
    "multilabel": (
        _up("macro_auc", "Mean area under the ROC curve over the labels that have both kinds of slide."),
        _up("map", "Mean average precision over the labels that have both kinds of slide."),
        _up("micro_auc", "Area under the ROC curve of all slides and labels pooled."),
    ),
    "survival": (
        _up("c_index", "Harrell's C: fraction of comparable pairs in which the earlier event has the higher risk."),
        _up("uno_c", "Uno's C: as Harrell's, each pair weighted against the censoring of the training split."),
        _up("auc_t", "Cumulative/dynamic area under the ROC curve, its mean over the times."),
        _down("ibs", "Integrated Brier score: squared error of the survival probabilities over the times."),
        Metric("ibs_kaplan_meier", None, 0.0, math.inf, "Integrated Brier score of the training split's Kaplan-Meier."),
        _up("c_index_stratified", "Harrell's C of the pairs inside a stratum."),
    ),
}
# Label of a multi-label task -> its own metrics, named KIND_LABEL in results.
LABEL_METRICS: tuple[Metric, ...] = (
    _up("auc", "Area under the ROC curve of the label."),
    _up("ap", "Average precision of the label; a random order has its prevalence."),
    Metric("prevalence", None, 0.0, 1.0, "Share of the slides with a known label that have it."),
)


MEAN = "mean"  # the mean over several targets of the metric that chooses each one's epoch


def of_target(target: str, metric: str) -> str:
    """The name of a metric of one of several targets."""
    return f"{target}.{metric}"


# Of all kinds, each once: what may choose an epoch, where the task has it.
CHOOSING = tuple(
    dict.fromkeys(
        metric.name for metrics in METRICS.values() for metric in metrics if metric.higher_is_better is not None
    )
)


def default_metric(kind: str) -> Metric:
    """Return the metric that chooses a task's epoch.

    Raises:
        ValueError: no kind of task has this name.
    """
    return _of_kind(kind)[0]


def metric_of(kind: str, name: str) -> Metric:
    """Return a metric of a kind of task by its name.

    Raises:
        ValueError: no kind of task, or none of its metrics, has this name.
    """
    metrics = {metric.name: metric for metric in _of_kind(kind)}
    if name not in metrics:
        raise ValueError(f"the metric of a {kind} task must be one of {listed(metrics)}, got {name!r}")
    return metrics[name]


def _of_kind(kind: str) -> tuple[Metric, ...]:
    if kind not in METRICS:
        raise ValueError(f"the kind of a task must be one of {listed(METRICS)}, got {kind!r}")
    return METRICS[kind]


def is_better(metric: Metric, value: float, than: float) -> bool:
    """Whether a value is better than another; NaN is better than nothing, and anything else is better than NaN.

    Raises:
        ValueError: the metric has no direction.
    """
    if metric.higher_is_better is None:
        raise ValueError(f"the metric that chooses must have a better direction, got {metric.name}")
    if math.isnan(value) or math.isnan(than):
        return not math.isnan(value)
    return value > than if metric.higher_is_better else value < than


# The metrics of every kind of task of which lower is better: no name has two directions.
LOWER_IS_BETTER = frozenset(
    metric.name for metrics in METRICS.values() for metric in metrics if metric.higher_is_better is False
)


def better_number(name: str, value: float | None) -> float:
    """A number that is higher for a better value, and lowest for one that is undefined or None.

    Args:
        name: the metric's, with or without "eval_" and its target.
        value: the metric's.
    """
    if value is None or math.isnan(value):
        return -math.inf
    return -value if name.removeprefix("eval_").rpartition(".")[2] in LOWER_IS_BETTER else value


def mean_of_defaults(values: Mapping[str, Measured]) -> Measured:
    """Return the mean over a model's tasks of the metric that chooses each one's epoch, all of which go up.

    It is undefined where one of them is, because a mean over other tasks is not comparable between epochs.

    Args:
        values: task -> its default metric.

    Raises:
        ValueError: no task.
    """
    if not values:
        raise ValueError("values must hold at least one task, got none")
    undefined = [f"{name} ({value.reason})" for name, value in values.items() if math.isnan(value.value)]
    if undefined:
        return Measured(math.nan, f"undefined of {listed(undefined)}")
    return Measured(math.fsum(value.value for value in values.values()) / len(values))
