"""DeLong against the formula with all pairs written out, the paired bootstrap against draws by hand, and mismatches."""

import csv
import itertools
import json
import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ds_wsi.cli import main
from ds_wsi.evaluation.bootstrap import resample_counts
from ds_wsi.evaluation.comparison import (
    compare_predictions,
    comparison_to_json,
    delong,
    exchange_test,
    format_comparison,
    read_predictions,
)
from ds_wsi.evaluation.metrics import METRIC_NAMES, slide_metrics


def pairwise_covariance(positive, scores):
    """DeLong's covariance from the m x n kernel, double sums as in the paper: no ranks."""
    components = []
    for score in scores:
        positives, others = score[positive], score[~positive]
        kernel = (positives[:, None] > others) + 0.5 * (positives[:, None] == others)
        components.append((kernel.mean(1), kernel.mean(0), kernel.mean()))
    covariance = np.zeros((2, 2))
    for i, (tens_i, ones_i, area_i) in enumerate(components):
        for j, (tens_j, ones_j, area_j) in enumerate(components):
            m, n = len(tens_i), len(ones_i)
            of_tens = sum((x - area_i) * (y - area_j) for x, y in zip(tens_i, tens_j, strict=True)) / (m - 1)
            of_ones = sum((x - area_i) * (y - area_j) for x, y in zip(ones_i, ones_j, strict=True)) / (n - 1)
            covariance[i, j] = of_tens / m + of_ones / n
    return covariance


def correlated_scores(n, seed, decimals):
    generator = np.random.default_rng(seed)
    positive = np.arange(n) % 3 == 0
    shared = generator.normal(size=n) + positive
    return positive, [np.round(shared + generator.normal(size=n), decimals) for _ in range(2)]


@pytest.mark.parametrize("decimals", [0, 1, 12])
@pytest.mark.parametrize("n", [6, 31, 200])
def test_delong_equals_the_formula_over_all_pairs(n, decimals):
    positive, scores = correlated_scores(n, seed=n, decimals=decimals)
    result = delong(positive, *scores)
    expected = pairwise_covariance(positive, scores)
    np.testing.assert_allclose(result.covariance, expected, rtol=1e-11, atol=1e-15)
    areas = [roc_auc_score(positive, score) for score in scores]
    np.testing.assert_allclose(
        [result.auc_a, result.auc_b, result.difference], [*areas, areas[1] - areas[0]], atol=1e-13
    )
    error = math.sqrt(expected[0, 0] + expected[1, 1] - 2 * expected[0, 1])
    assert result.z == pytest.approx((areas[1] - areas[0]) / error, rel=1e-10, abs=1e-12)
    ends = (areas[1] - areas[0]) + np.array([-1, 1]) * 1.959963984540054 * error
    np.testing.assert_allclose([result.low, result.high], ends.clip(-1, 1), rtol=1e-12)
    # The normal's tail, from another formula than erfc.
    assert result.p_value == pytest.approx(2 * (1 - 0.5 * (1 + math.erf(abs(result.z) / math.sqrt(2)))), abs=1e-12)


def test_delong_rejects_a_true_null_as_often_as_it_says():
    """Two equally good models of 60 slides: 5% of 400 tests, within three standard errors."""
    rejected = [delong(*_null(seed)).p_value < 0.05 for seed in range(400)]
    assert abs(np.mean(rejected) - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 400)


def _null(seed):
    positive, scores = correlated_scores(60, seed + 1000, 12)
    return positive, *scores


@pytest.mark.parametrize("positive", [[True, False, False], [True, True, True], [True, True, False, False]])
def test_delong_is_undefined_without_two_of_a_class_or_without_variance(positive):
    positive = np.array(positive)
    scores = np.linspace(0, 1, len(positive))
    result = delong(positive, scores, scores)
    assert math.isnan(result.p_value)
    assert math.isnan(result.low)


def write_run(folder, labels, probabilities, patients=None, order=None, classes="abc", names=None):
    folder.mkdir(parents=True)
    classes = classes[: probabilities.shape[1]]
    names = names or [f"s{row}" for row in range(len(labels))]
    with (folder / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["slide_id", "patient_id", "label", "predicted", "n_tiles", *(f"probability_{c}" for c in classes)]
        )
        for row in range(len(labels)) if order is None else order:
            patient = names[row] if patients is None else patients[row]
            chances = [repr(float(value)) for value in probabilities[row]]
            writer.writerow([names[row], patient, classes[labels[row]], "", 1, *chances])
    return folder


def random_runs(n, classes, seed=0):
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    logits = [generator.normal(size=(n, classes)) + gain * np.eye(classes)[labels] for gain in (0.5, 2.0)]
    return labels, [np.exp(each) / np.exp(each).sum(1, keepdims=True) for each in logits]


@pytest.mark.parametrize("classes", [2, 3])
def test_the_paired_bootstrap_draws_patients_the_same_for_both(tmp_path, classes):
    labels, (one, two) = random_runs(24, classes)
    patients = [f"p{row * row % 17}" for row in range(24)]  # one to four slides each
    names = list(dict.fromkeys(patients))
    order = np.random.default_rng(5).permutation(24)  # the other file's rows lie otherwise
    a = read_predictions(write_run(tmp_path / "a", labels, one, patients))
    b = read_predictions(write_run(tmp_path / "b", labels, two, patients, order))
    comparison = compare_predictions(a, b, n_resamples=20, seed=3)
    assert (comparison.n_slides, comparison.n_patients) == (24, len(names))
    differences = {name: [] for name in METRIC_NAMES}
    for counts in np.concatenate(list(resample_counts(len(names), 20, seed=3))):
        rows = np.repeat(np.arange(24), [counts[names.index(patient)] for patient in patients])
        each = [slide_metrics(labels[rows], run[rows]) for run in (one, two)]
        for name in METRIC_NAMES:
            differences[name].append(each[1][name] - each[0][name])
    for name, values in differences.items():
        defined = np.array(values)[np.isfinite(values)]
        metric = comparison.metrics[name]
        assert metric.n_resamples_used == len(defined)
        np.testing.assert_allclose([metric.low, metric.high], np.quantile(defined, [0.025, 0.975]), atol=1e-12)
    assert (comparison.delong is None) == (classes == 3)
    assert "B - A" in format_comparison(comparison)
    json.dumps(comparison_to_json(comparison), allow_nan=False)


def test_a_run_compared_with_itself_differs_in_nothing(tmp_path):
    labels, (one, _) = random_runs(12, 2)
    run = read_predictions(write_run(tmp_path / "a", labels, one))
    comparison = compare_predictions(run, run, n_resamples=40)
    assert all((each.difference, each.p_value) == (0, 1) for each in comparison.metrics.values())
    assert all(math.isnan(each.low) for each in comparison.metrics.values())
    assert math.isnan(comparison.delong.p_value)
    assert "too few slides to tell: the models differ on 0 patients" in format_comparison(comparison)


@pytest.mark.parametrize("classes", [2, 3])
def test_p_values_are_the_share_of_exchanges_with_as_large_a_difference(classes):
    labels, scores = random_runs(11, classes)
    patients = [f"p{row % 6}" for row in range(11)]
    scores[1][0] = scores[0][0]  # p0 has one slide with two predictions that differ, and one without
    scores[1][5] = scores[0][5]  # p5 differs in nothing
    p_values, differing, smallest = exchange_test(labels, tuple(scores), patients)
    assert (differing, smallest) == (5, 2 / 2**5)
    differences = {name: [] for name in METRIC_NAMES}
    for exchanged in itertools.product([False, True], repeat=5):
        swap = np.array([patient != "p5" and exchanged[int(patient[1])] for patient in patients])[:, None]
        each = [slide_metrics(labels, np.where(swap, scores[1 - k], scores[k])) for k in (0, 1)]
        for name in METRIC_NAMES:
            differences[name].append(abs(each[1][name] - each[0][name]))
    for name, values in differences.items():
        defined = np.array(values)[np.isfinite(values)]
        assert p_values[name] == pytest.approx(np.mean(defined >= values[0] - 1e-9)), name


def test_four_slides_of_which_two_differ_prove_nothing(tmp_path):
    labels = np.array([0, 0, 1, 1])
    one = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.1, 0.9]])
    two = np.eye(2)[labels] * 0.8 + 0.1
    two[[0, 3]] = one[[0, 3]]
    runs = [read_predictions(write_run(tmp_path / name, labels, run)) for name, run in (("a", one), ("b", two))]
    comparison = compare_predictions(*runs)
    assert comparison.n_differing == 2
    assert min(each.p_value for each in comparison.metrics.values()) >= 0.5
    assert "too few slides to tell: the models differ on 2 patients, and no p below 0.5 is possible" in (
        format_comparison(comparison)
    )


@pytest.mark.parametrize("n", [10, 40])  # all exchanges, and drawn ones
def test_the_exchange_test_rejects_a_true_null_no_more_often_than_it_says(n):
    rejected = []
    for seed in range(300):
        generator = np.random.default_rng(seed)
        labels = np.arange(n) % 2
        right = [np.where(generator.random(n) < 0.75, labels, 1 - labels) for _ in range(2)]
        scores = tuple(np.eye(2)[each] * 0.8 + 0.1 for each in right)
        rejected.append(exchange_test(labels, scores, [str(row) for row in range(n)], 200, seed)[0]["accuracy"] <= 0.05)
    assert np.mean(rejected) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    assert n < 20 or np.mean(rejected) > 0.005, "it rejects sometimes"


def test_a_large_difference_of_many_slides_is_seen():
    labels, scores = random_runs(60, 2)
    p_values, _, smallest = exchange_test(labels, tuple(scores), [str(row) for row in range(60)], 1000)
    assert p_values["auc"] < 0.02
    assert smallest == 1 / 1001


def changed(tmp_path, **options):
    labels, (one, two) = random_runs(8, 2)
    other = options.pop("labels", labels)
    a = read_predictions(write_run(tmp_path / "a", labels, one))
    return lambda: compare_predictions(a, read_predictions(write_run(tmp_path / "b", other, two, **options)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": range(6)}, r"same slides, got s6, s7 only in .*a.predictions\.csv"),
        ({"names": [*"abcdefgh"]}, r"s0, s1, s2, s3, s4 and 3 more only in .* and a, b, c, d, e and 3 more only in"),
        ({"labels": [0, 1, 0, 1, 1, 1, 0, 1]}, r"same label for each slide, got s4 \('a' and 'b'\)"),
        ({"patients": ["s0", "s1", "p", *[f"s{row}" for row in range(3, 8)]]}, r"same patient .* s2 \('s2' and 'p'\)"),
        ({"classes": "ba"}, r"same classes, got \('a', 'b'\) and \('b', 'a'\)"),
        ({"order": [0, 1, 2, 3, 4, 5, 6, 7, 3]}, r"each slide once, got s3"),
    ],
)
def test_runs_of_other_slides_or_labels_are_refused_by_name(tmp_path, options, message):
    compare = changed(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        compare()


def test_the_command_prints_and_writes_the_comparison(tmp_path, capsys):
    labels, (one, two) = random_runs(40, 2)
    runs = [str(write_run(tmp_path / name, labels, run)) for name, run in (("a", one), ("b", two))]
    assert main(["compare", *runs, "--output_dir", str(tmp_path / "out"), "--n_resamples", "100"]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    auc = written["paired_bootstrap"]["auc"]
    assert auc["difference"] == pytest.approx(roc_auc_score(labels, two[:, 1]) - roc_auc_score(labels, one[:, 1]))
    assert written["delong"]["difference"] == pytest.approx(auc["difference"])
    assert f"{auc['a']:.3f}" in printed
    assert "DeLong" in printed
    assert "A on unknown tiles" in printed
    (tmp_path / "a" / "metrics.json").write_text('{"evaluation": {"tiles": 256, "runs": 100, "seed": 0}}')
    assert read_predictions(runs[0]).protocol == "256 random tiles, 100 runs, their mean probabilities"
    assert main(["compare", runs[0], str(tmp_path / "none"), "--output_dir", str(tmp_path)]) == 2
