"""Metrics against values worked out by hand, and through evaluate."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ds_wsi.evaluation.hf_metric import SlideClassification
from ds_wsi.evaluation.metrics import METRIC_NAMES, slide_metrics

# 6 slides, 3 grades; predicted 0 0 1 2 2 0.
GRADES = np.array([0, 0, 1, 1, 2, 2])
GRADE_PROBABILITIES = np.array(
    [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.6, 0.2], [0.1, 0.3, 0.6], [0.1, 0.2, 0.7], [0.5, 0.1, 0.4]]
)


def binary(chances: list[float]) -> np.ndarray:
    chance = np.asarray(chances)
    return np.stack([1 - chance, chance], axis=1)


def test_binary_by_hand():
    # Predicted 0 1 1 1 0: TN 1, FP 1, TP 2, FN 1.
    values = slide_metrics([0, 0, 1, 1, 1], binary([0.1, 0.7, 0.8, 0.7, 0.2]))
    assert tuple(values) == METRIC_NAMES
    assert values["accuracy"] == pytest.approx(3 / 5)
    assert values["balanced_accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    # Pairs (positive, negative): 0.8 beats both, 0.7 beats 0.1 and ties 0.7, 0.2 beats 0.1.
    assert values["auc"] == pytest.approx((2 + 1.5 + 1) / 6)
    assert values["f1"] == pytest.approx(4 / 6)
    assert values["quadratic_weighted_kappa"] == pytest.approx(1 - (2 / 5) / ((2 * 3 + 3 * 2) / 25))


def test_multiclass_by_hand():
    values = slide_metrics(GRADES, GRADE_PROBABILITIES)
    assert values["accuracy"] == pytest.approx(4 / 6)
    assert values["balanced_accuracy"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert values["auc"] == pytest.approx((1 + 7.5 / 8 + 7 / 8) / 3)  # grade 1: 0.6 beats 4, 0.3 beats 3 and ties one
    assert values["f1"] == pytest.approx((4 / 5 + 2 / 3 + 1 / 2) / 3)
    # Disagreement 1 + 4 observed; expected from the margins (2, 2, 2) and (3, 1, 2).
    expected = (2 * (1 * 1 + 2 * 4) + 2 * (3 * 1 + 2 * 1) + 2 * (3 * 4 + 1 * 1)) / 6
    assert values["quadratic_weighted_kappa"] == pytest.approx(1 - 5 / expected)


def test_kappa_keeps_the_distance_over_an_absent_grade():
    # Grade 1 occurs nowhere; one slide of three is two grades off.
    values = slide_metrics([0, 2, 2, 3], np.eye(4)[[0, 2, 0, 3]])
    expected = (1 * (2 * 0 + 1 * 4 + 1 * 9) + 2 * (2 * 4 + 1 * 0 + 1 * 1) + 1 * (2 * 9 + 1 * 1 + 1 * 0)) / 4
    assert values["quadratic_weighted_kappa"] == pytest.approx(1 - 4 / expected)


def test_absent_class_is_left_out_of_the_means():
    probabilities = np.array([[0.8, 0.1, 0.1], [0.6, 0.1, 0.3], [0.1, 0.2, 0.7]])
    values = slide_metrics([0, 0, 2], probabilities)
    assert values["auc"] == values["balanced_accuracy"] == values["f1"] == 1.0


@pytest.mark.parametrize("classes", [2, 3])
def test_one_class_leaves_the_undefined_undefined(classes: int):
    values = slide_metrics([0, 0, 0], np.eye(classes)[[0, 0, 0]])
    assert values["accuracy"] == 1.0
    undefined = {name for name, value in values.items() if math.isnan(value)}
    assert undefined == {"auc", "balanced_accuracy", "quadratic_weighted_kappa"} | ({"f1"} if classes == 2 else set())


@pytest.mark.filterwarnings("error")
def test_undefined_metrics_do_not_warn():
    slide_metrics([1, 1], binary([0.2, 0.9]))
    slide_metrics([2, 2], np.eye(3)[[0, 1]])


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0, 1], [0.2, 0.8], r"probabilities must have shape \[N, C\]"),
        ([0, 1], [[1.0], [1.0]], r"C >= 2, got \[2, 1\]"),
        ([0], [[0.5, 0.5], [0.5, 0.5]], r"labels must have shape \[2\]"),
        ([], np.empty((0, 2)), "at least one slide"),
        ([0.0, 1.0], [[0.5, 0.5], [0.5, 0.5]], "labels must be integers, got float64"),
        ([0, 2], [[0.5, 0.5], [0.5, 0.5]], r"lie in \[0, 2\), got 2 \(slide b\)"),
        ([0, -1], [[0.5, 0.5], [0.5, 0.5]], r"lie in \[0, 2\), got -1 \(slide b\)"),
        ([0, 1], [[0.5, 0.5], [0.5, math.nan]], r"finite and not negative, got .*nan.* \(slide b\)"),
        ([0, 1], [[0.5, 0.5], [-0.5, 1.5]], r"finite and not negative, .* \(slide b\)"),
        ([0, 1], [[0.5, 0.5], [0.5, 0.502]], r"sum to 1 within 0.001, got 1.002 \(slide b\)"),
    ],
)
def test_bad_predictions_are_refused_by_name(labels, probabilities, message):
    with pytest.raises(ValueError, match=message) as error:
        slide_metrics(labels, probabilities, slide_ids=["a", "b"][: len(probabilities)])
    assert "HINT: " in str(error.value)


def test_rounding_of_a_low_precision_softmax_is_accepted():
    assert slide_metrics([0, 1], [[0.5, 0.5005], [0.2, 0.7995]])["accuracy"] == 0.5


def test_evaluate_metric_over_batches_equals_the_function():
    metric = SlideClassification()
    for rows in (slice(0, 4), slice(4, 6)):
        metric.add_batch(predictions=GRADE_PROBABILITIES[rows], references=GRADES[rows])
    assert metric.compute() == slide_metrics(GRADES, GRADE_PROBABILITIES)
    # A second epoch starts empty.
    assert metric.compute(predictions=GRADE_PROBABILITIES[:4], references=GRADES[:4]) == slide_metrics(
        GRADES[:4], GRADE_PROBABILITIES[:4]
    )
    with pytest.raises(ValueError, match="slide six"):
        metric.compute(predictions=[[0.5, 0.5]], references=[6], slide_ids=["six"])


PROCESS = """
import os, socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from ds_wsi.evaluation.hf_metric import SlideClassification
metric = SlideClassification()
for _ in range(20):
    metric.add_batch(predictions=[[0.9, 0.1], [0.3, 0.7]], references=[0, int(sys.argv[1])])
print(metric.compute()["accuracy"])
"""


@pytest.mark.slow
def test_processes_at_once_share_nothing_and_touch_no_home(tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir()
    environment = {"HOME": str(home), "HF_HOME": str(home / "hf"), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": "/usr/bin:/bin"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(label)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for label in (0, 1)
    ]
    outcomes = [(*process.communicate(timeout=120), process.returncode) for process in processes]
    assert [(out.strip(), code) for out, _, code in outcomes] == [("0.5", 0), ("1.0", 0)], outcomes
    assert not (home / "hf" / "metrics").exists()
    assert not list(tmp_path.glob("ds_wsi_metrics_*")), "the temporary folder goes with the metric"
