"""Slide-level classification metrics: one pure function. `hf_metric` has the same for Hugging Face evaluate."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

METRIC_NAMES = ("accuracy", "balanced_accuracy", "auc", "quadratic_weighted_kappa", "f1")
SUM_TOLERANCE = 1e-3  # of a slide's probabilities: what a float16 softmax over a few classes keeps

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def slide_metrics(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, *, slide_ids: Sequence[str] | None = None
) -> dict[str, float]:
    """Compute the metrics of a set of slides; the predicted class is the most probable one (the first of equals).

    Args:
        labels: integer [N], indices of the true classes.
        probabilities: float [N, C], each row a distribution over the C classes.
        slide_ids: N names, for the messages only.

    Returns:
        METRIC_NAMES -> value; NaN where the data leave a metric undefined:
        accuracy: fraction of slides predicted right.
        balanced_accuracy: mean recall over the classes present; needs two of them.
        auc: area under the ROC curve. C = 2: of class 1; C > 2: mean one-vs-rest over the classes present. Needs two.
        quadratic_weighted_kappa: of all C classes in their order; undefined when labels and predictions are one class.
        f1: C = 2: of class 1; C > 2: mean over the classes that occur among labels or predictions.

    Raises:
        ValueError: see `check_predictions`.
    """
    labels, probabilities = check_predictions(labels, probabilities, slide_ids)
    predicted = probabilities.argmax(axis=1)
    values = (
        float(np.mean(labels == predicted)),
        _balanced_accuracy(labels, predicted),
        _auc(labels, probabilities),
        _quadratic_weighted_kappa(labels, predicted, probabilities.shape[1]),
        _f1(labels, predicted, probabilities.shape[1]),
    )
    return dict(zip(METRIC_NAMES, values, strict=True))


def check_predictions(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, slide_ids: Sequence[str] | None = None
) -> tuple[IntArray, FloatArray]:
    """Return labels (int64 [N]) and probabilities (float64 [N, C]) once they are known to make sense.

    Raises:
        ValueError: shapes that do not fit, no slide, labels that are no class index, probabilities that are not
            finite, negative, or do not sum to 1; the first offending slide is named.
    """
    label_array, probability_array = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    _check_shapes(label_array, probability_array, slide_ids)
    _check_values(label_array, probability_array, slide_ids)
    return label_array.astype(np.int64), probability_array


def _check_shapes(labels: np.ndarray, probabilities: np.ndarray, slide_ids: Sequence[str] | None) -> None:
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise ValueError(
            f"probabilities must have shape [N, C] with C >= 2, got {list(probabilities.shape)}. "
            "HINT: for two classes give both columns, 1 - p and p."
        )
    if labels.shape != probabilities.shape[:1]:
        raise ValueError(
            f"labels must have shape [{len(probabilities)}] as probabilities has {len(probabilities)} rows, "
            f"got {list(labels.shape)}. HINT: give one class index per slide."
        )
    if slide_ids is not None and len(slide_ids) != len(probabilities):
        raise ValueError(
            f"slide_ids must have {len(probabilities)} names, got {len(slide_ids)}. HINT: give one name per slide."
        )
    if len(labels) == 0:
        raise ValueError("labels must hold at least one slide, got 0. HINT: look whether the split is empty.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}. HINT: give class indices, not names.")


def _check_values(labels: np.ndarray, probabilities: np.ndarray, slide_ids: Sequence[str] | None) -> None:
    classes = probabilities.shape[1]
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        raise ValueError(
            f"labels must lie in [0, {classes}), got {labels[wrong[0]]} ({_slide(wrong[0], slide_ids)}). "
            "HINT: count the classes that the model was built for."
        )
    wrong = np.flatnonzero(~np.isfinite(probabilities).all(axis=1) | (probabilities < 0).any(axis=1))
    if wrong.size:
        raise ValueError(
            f"probabilities must be finite and not negative, got {probabilities[wrong[0]].tolist()} "
            f"({_slide(wrong[0], slide_ids)}). HINT: give the softmax of the logits; NaN comes from a diverged model."
        )
    totals = probabilities.sum(axis=1)
    wrong = np.flatnonzero(np.abs(totals - 1) > SUM_TOLERANCE)
    if wrong.size:
        raise ValueError(
            f"probabilities must sum to 1 within {SUM_TOLERANCE}, got {totals[wrong[0]]:.6g} "
            f"({_slide(wrong[0], slide_ids)}). HINT: give the softmax of the logits."
        )


def _slide(row: Any, slide_ids: Sequence[str] | None) -> str:
    return f"row {row}" if slide_ids is None else f"slide {slide_ids[int(row)]}"


def _balanced_accuracy(labels: IntArray, predicted: IntArray) -> float:
    from sklearn.metrics import recall_score  # here, because it takes a second that options do not need

    present = np.unique(labels)
    if len(present) < 2:
        return math.nan  # the mean would be the one class's recall: accuracy under a better name
    return float(recall_score(labels, predicted, labels=present, average="macro"))


def _auc(labels: IntArray, probabilities: FloatArray) -> float:
    from sklearn.metrics import roc_auc_score  # here, because it takes a second that options do not need

    present = np.unique(labels)
    if len(present) < 2:
        return math.nan
    scored = [1] if probabilities.shape[1] == 2 else present
    return float(np.mean([roc_auc_score(labels == index, probabilities[:, index]) for index in scored]))


def _quadratic_weighted_kappa(labels: IntArray, predicted: IntArray, classes: int) -> float:
    from sklearn.metrics import cohen_kappa_score  # here, because it takes a second that options do not need

    if len(np.union1d(labels, predicted)) < 2:
        return math.nan  # no disagreement is expected by chance: 0 / 0
    # All classes are named: left to itself sklearn would close the gap that an absent grade leaves.
    return float(cohen_kappa_score(labels, predicted, labels=range(classes), weights="quadratic"))


def _f1(labels: IntArray, predicted: IntArray, classes: int) -> float:
    from sklearn.metrics import f1_score  # here, because it takes a second that options do not need

    occurring = np.union1d(labels, predicted)
    if classes > 2:
        return float(f1_score(labels, predicted, labels=occurring, average="macro"))
    return float(f1_score(labels == 1, predicted == 1)) if 1 in occurring else math.nan
