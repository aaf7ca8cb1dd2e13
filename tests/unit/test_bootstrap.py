"""The vectorised bootstrap against sklearn on each resample written out."""

import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from ds_wsi.evaluation import bootstrap
from ds_wsi.evaluation.bootstrap import (
    MetricInterval,
    bootstrap_metrics,
    format_table,
    metrics_from_json,
    metrics_to_json,
    resample_counts,
    weighted_metrics,
)
from ds_wsi.evaluation.metrics import METRIC_NAMES, slide_metrics


def predictions(slides: int, classes: int, seed: int, decimals: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities with many ties: rounded, the last class taking the rest."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=slides)
    logits = generator.normal(size=(slides, classes)) + 0.8 * np.eye(classes)[labels]
    rounded = np.floor(np.exp(logits) / np.exp(logits).sum(1, keepdims=True) * 10**decimals) / 10**decimals
    rounded[:, -1] = 1 - rounded[:, :-1].sum(axis=1)
    return labels, np.clip(np.round(rounded, 6), 0, 1)


@pytest.mark.parametrize("slides", [3, 7, 40])
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_every_resample_equals_sklearn(slides: int, classes: int):
    """Many resamples of 3 slides hold one class only; `slide_metrics` is sklearn, guarded."""
    labels, probabilities = predictions(slides, classes, seed=slides + classes)
    (counts,) = resample_counts(slides, 60, seed=1)
    vectorised = weighted_metrics(labels, probabilities, counts)
    for row, count in enumerate(counts):
        drawn = np.repeat(np.arange(slides), count)
        expected = slide_metrics(labels[drawn], probabilities[drawn])
        for name in METRIC_NAMES:
            np.testing.assert_allclose(vectorised[name][row], expected[name], rtol=0, atol=1e-12, err_msg=name)


def test_counts_are_draws_with_replacement():
    counts = np.concatenate(list(resample_counts(8, 4000, seed=0)))
    assert counts.shape == (4000, 8)
    assert (counts.sum(axis=1) == 8).all()
    # Binomial(8, 1/8): mean 1, variance 7/8; five standard errors.
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=5 * math.sqrt(7 / 8 / 4000))
    np.testing.assert_allclose(counts.var(axis=0), 7 / 8, atol=0.15)


def test_chunks_change_nothing_and_bound_the_memory(monkeypatch: pytest.MonkeyPatch):
    labels, probabilities = predictions(50, 3, seed=0)
    whole = bootstrap_metrics(labels, probabilities, n_resamples=100)
    monkeypatch.setattr(bootstrap, "CHUNK_ELEMENTS", 350)
    assert [len(counts) for counts in resample_counts(50, 100, seed=0)] == [7] * 14 + [2]
    assert bootstrap_metrics(labels, probabilities, n_resamples=100) == whole


def test_seed_determines_the_intervals():
    labels, probabilities = predictions(50, 2, seed=0)
    first, again, other = (bootstrap_metrics(labels, probabilities, 200, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first["auc"] != other["auc"]
    assert first["auc"].value == other["auc"].value == slide_metrics(labels, probabilities)["auc"]


def test_interval_is_the_percentiles_of_the_resamples():
    labels, probabilities = predictions(30, 2, seed=2)
    (counts,) = resample_counts(30, 500, seed=7)
    accuracy = counts @ (probabilities.argmax(1) == labels) / 30
    low, high = np.quantile(accuracy, [0.05, 0.95])
    interval = bootstrap_metrics(labels, probabilities, 500, confidence=0.9, seed=7)["accuracy"]
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-12)
    assert interval.n_resamples_used == 500
    assert interval.confidence == 0.9


def test_coverage_of_a_known_accuracy():
    """Slides right with probability 0.8: the 90% interval holds 0.8 in nearly 90% of the experiments.

    Over 300 experiments of 100 slides; the percentile interval of a proportion covers slightly less than its level.
    """
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        labels = generator.integers(2, size=100)
        right = generator.random(100) < 0.8
        probabilities = np.eye(2)[np.where(right, labels, 1 - labels)]
        interval = bootstrap_metrics(labels, probabilities, 300, confidence=0.9, seed=seed)["accuracy"]
        covered += interval.low <= 0.8 <= interval.high
    assert 0.82 <= covered / 300 <= 0.96


def test_undefined_resamples_are_left_out_and_counted():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    intervals = bootstrap_metrics([0, 0, 1], probabilities, 2000)
    # Both classes are drawn in 1 - (2/3)^3 - (1/3)^3 = 2/3 of the resamples.
    assert intervals["auc"].n_resamples_used == pytest.approx(2000 * 2 / 3, abs=5 * math.sqrt(2000 * 2 / 9))
    assert intervals["auc"].method == "undetermined"
    assert math.isnan(intervals["auc"].low)
    assert intervals["accuracy"].n_resamples_used == 2000


def test_one_class_has_no_interval_and_json_has_no_nan():
    intervals = bootstrap_metrics([0, 0], [[0.9, 0.1], [0.8, 0.2]], 50)
    assert intervals["auc"].n_resamples_used == 0
    plain = json.loads(json.dumps(metrics_to_json(intervals), allow_nan=False))
    assert plain["auc"] == {"value": None, "low": None, "high": None, "confidence": 0.95} | {
        "n_resamples_used": 0,
        "method": "undetermined",
    }
    assert plain["accuracy"]["value"] == 1.0
    assert metrics_from_json(plain)["accuracy"] == intervals["accuracy"]


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize(("slides", "patients"), [(20, 20), (20, 8), (3, 3)])
def test_where_all_are_right_or_wrong_the_accuracy_has_an_exact_interval(slides, patients, right):
    labels = np.arange(slides) % 2
    probabilities = np.eye(2)[labels if right else 1 - labels]
    names = [f"p{row % patients}" for row in range(slides)]
    intervals = bootstrap_metrics(labels, probabilities, 200, patients=names)
    interval = intervals["accuracy"]
    exact = binomtest(patients if right else 0, patients).proportion_ci(0.95, method="exact")
    assert (interval.low, interval.high) == pytest.approx((exact.low, exact.high), abs=1e-9)
    assert interval.method == "exact"
    assert intervals["balanced_accuracy"].method == "undetermined"
    table = format_table(intervals)
    assert f"[{exact.low:.3f}, {exact.high:.3f}]" in table
    assert "not told: all resamples agree" in table
    assert "[1.000, 1.000]" not in table


def test_one_error_is_enough_for_a_bootstrap():
    labels = np.arange(20) % 2
    probabilities = np.eye(2)[labels]
    probabilities[3] = probabilities[3, ::-1]
    interval = bootstrap_metrics(labels, probabilities, 500)["accuracy"]
    assert interval.method == "bootstrap"
    assert interval.low < 0.95 < interval.high <= 1


def test_table_for_the_terminal():
    table = format_table(
        {"auc": MetricInterval(0.91234, 0.8, 1.0, 2000, 0.9), "f1": MetricInterval(math.nan, math.nan, math.nan, 0)}
    )
    assert table.splitlines() == [
        "metric   value  90% interval",
        "auc      0.912  [0.800, 1.000]",
        "f1           -  undefined",
    ]


@pytest.mark.parametrize("wrong", [{"n_resamples": 0}, {"confidence": 1.0}, {"confidence": 0.0}])
def test_bad_settings_are_refused(wrong: dict[str, float]):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be .*HINT"):
        bootstrap_metrics([0, 1], np.eye(2), **wrong)
