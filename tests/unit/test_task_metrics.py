"""Metrics of regression and ordinal tasks, and the table of all, against other libraries."""

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from metric_columns import columns, few
from scipy import stats
from sklearn import metrics as sk
from survival_cohort import numbers, written_out

from ds_wsi.evaluation.bootstrap import bootstrap_measures, bootstrap_metrics
from ds_wsi.evaluation.metrics import METRIC_NAMES
from ds_wsi.evaluation.task_metrics.measured import Measured
from ds_wsi.evaluation.task_metrics.ordinal import (
    fit_grade_thresholds,
    grades_of_scores,
    ordinal_metrics,
    weighted_ordinal_metrics,
)
from ds_wsi.evaluation.task_metrics.regression import regression_metrics, weighted_regression_metrics
from ds_wsi.evaluation.task_metrics.table import METRICS, default_metric, is_better, mean_of_defaults, metric_of

pytestmark = pytest.mark.filterwarnings("error")


class TestRegression:
    TARGETS = numbers("8 14 36 11 20 7 19 16 10 9 16 23 3 7 5 16 6 6")
    PREDICTIONS = numbers("12 8 37 17 7 12 12 16 12 -1 15 20 13 3 13 10 7 4")
    COUNTS = np.array([1, 2, 2, 0, 1, 2, 0, 2, 3, 2, 2, 1, 3, 0, 1, 2, 2, 0])

    def test_other_libraries(self):
        values = {name: value.value for name, value in regression_metrics(self.TARGETS, self.PREDICTIONS).items()}
        # scipy 1.17.1 and scikit-learn 1.9.1; torchmetrics 1.9.0 agrees, of spearman in float32.
        assert values == {
            "pearson": pytest.approx(0.7097219706973898, abs=1e-14),
            "spearman": pytest.approx(0.3833352050918343, abs=1e-14),
            "r2": pytest.approx(0.4096184107002361, abs=1e-14),
            "mae": pytest.approx(4.944444444444445, abs=1e-14),
            "rmse": pytest.approx(6.087327455916558, abs=1e-14),
        }
        weighted = weighted_regression_metrics(self.TARGETS, self.PREDICTIONS, self.COUNTS[None])
        # statsmodels 0.15.0 and numpy; scipy of the rows written out; scikit-learn by sample_weight.
        expected = (0.7366806469094288, 0.3326955660889033, 0.4842219359060883, 4.769230769230769, 6.108002317263174)
        np.testing.assert_allclose([value[0] for value in weighted.values()], expected, rtol=0, atol=1e-13)

    @few
    @given(columns(st.integers(-3, 3), st.integers(-3, 3), st.integers(0, 3)))
    def test_counts_are_rows_written_out_as_libraries_have_them(self, drawn):
        targets, predictions, counts = drawn
        assume(counts.any())
        targets, predictions = targets / 7, predictions / 7  # sums are not exact
        weighted = weighted_regression_metrics(targets, predictions, counts[None])
        x, y = (column[written_out(counts)] for column in (targets, predictions))
        values = regression_metrics(x, y)
        varies = np.ptp(x) > 0 and np.ptp(y) > 0
        expected = {
            "pearson": stats.pearsonr(x, y)[0] if varies else math.nan,
            "spearman": stats.spearmanr(x, y)[0] if varies else math.nan,
            "r2": sk.r2_score(x, y) if np.ptp(x) > 0 else math.nan,
            "mae": sk.mean_absolute_error(x, y),
            "rmse": math.sqrt(sk.mean_squared_error(x, y)),
        }
        for name, value in weighted.items():
            assert value[0] == pytest.approx(expected[name], nan_ok=True, abs=1e-12), name
            assert values[name].value == pytest.approx(expected[name], nan_ok=True, abs=1e-12), name
            assert bool(values[name].reason) == math.isnan(expected[name])
            metric = metric_of("regression", name)
            assert math.isnan(value[0]) or metric.low <= value[0] <= metric.high

    def test_a_constant_leaves_no_correlation_and_says_which(self):
        values = regression_metrics([1, 2, 3], [0.1, 0.1, 0.1])
        assert values["pearson"].reason == values["spearman"].reason == "all predictions are 0.1"
        assert values["r2"].value < 0
        values = regression_metrics([0.1, 0.1, 0.1], [1, 2, 3])
        assert [name for name, value in values.items() if math.isnan(value.value)] == ["pearson", "spearman", "r2"]
        assert values["r2"].reason == "all targets are 0.1"
        # A resample that holds one value is undefined, not a correlation of rounding errors.
        weighted = weighted_regression_metrics(
            np.array([0.1, 0.1, 0.7]), np.array([1.0, 2.0, 3.0]), np.array([[2, 1, 0]])
        )
        assert np.isnan([weighted["pearson"][0], weighted["spearman"][0], weighted["r2"][0]]).all()

    def test_digits_are_kept_far_from_zero(self):
        values = regression_metrics(self.TARGETS + 1e7, self.PREDICTIONS + 1e7)
        assert values["pearson"].value == pytest.approx(0.7097219706973898, abs=1e-9)
        assert values["r2"].value == pytest.approx(0.4096184107002361, abs=1e-9)

    def test_r2_of_the_mean_is_zero_and_of_standardised_predictions_is_not_that_of_units(self):
        assert regression_metrics([1, 2, 6], [3, 3, 3])["r2"].value == 0
        standardised = (self.PREDICTIONS - self.TARGETS.mean()) / self.TARGETS.std()
        assert regression_metrics(self.TARGETS, standardised)["r2"].value < 0

    def test_the_bootstrap_is_one_call(self):
        measure = partial(weighted_regression_metrics, self.TARGETS, self.PREDICTIONS)
        intervals = bootstrap_measures([measure], 18, 200)
        assert intervals["mae"].value == pytest.approx(4.944444444444445)
        assert intervals["mae"].low < 4.9 < intervals["mae"].high

    def test_missing_targets_are_refused_by_name(self):
        with pytest.raises(ValueError, match=r"targets must be finite, got nan \(slide b\).*HINT: leave out"):
            regression_metrics([1, math.nan], [1, 2], slide_ids=["a", "b"])
        with pytest.raises(ValueError, match=r"predictions must have shape \[2\], got \[2, 1\]"):
            regression_metrics([1, 2], [[1], [2]])


class TestOrdinal:
    GRADES = np.array([0, 2, 3, 2, 3, 1, 1, 3, 0, 0, 0, 1, 0, 3, 3, 1, 0, 2, 0, 2, 0, 3, 2, 3])
    PREDICTED = np.array([4, 3, 3, 3, 2, 0, 1, 4, 0, 1, 1, 1, 0, 3, 3, 1, 0, 3, 1, 1, 0, 3, 1, 2])

    def test_other_libraries(self):
        values = ordinal_metrics(self.GRADES, self.PREDICTED, 5)
        # scikit-learn 1.9.1 and statsmodels 0.15.0; torchmetrics 1.9.0 in float32.
        assert values["quadratic_weighted_kappa"].value == pytest.approx(0.6429330499468651, abs=1e-14)
        assert values["accuracy"].value == pytest.approx(0.4583333333333333, abs=1e-15)
        assert values["mae"].value == pytest.approx(0.6666666666666666, abs=1e-15)

    @few
    @given(columns(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3)))
    def test_counts_are_rows_written_out_as_libraries_have_them(self, drawn):
        grades, predicted, counts = drawn
        assume(counts.any())
        weighted = weighted_ordinal_metrics(grades, predicted, 5, counts[None])
        x, y = (column[written_out(counts)] for column in (grades, predicted))
        one = len(np.union1d(x, y)) < 2
        expected = {
            "quadratic_weighted_kappa": math.nan
            if one
            else sk.cohen_kappa_score(x, y, labels=range(5), weights="quadratic"),
            "accuracy": np.mean(x == y),
            "mae": np.mean(np.abs(x - y)),
        }
        for name, value in ordinal_metrics(x, y, 5).items():
            assert weighted[name][0] == pytest.approx(expected[name], nan_ok=True, abs=1e-12), name
            assert value.value == pytest.approx(expected[name], nan_ok=True, abs=1e-12), name
            assert bool(value.reason) == (name == "quadratic_weighted_kappa" and one)

    def test_the_distance_over_an_absent_grade_is_kept(self):
        with_gap = ordinal_metrics([0, 2, 2, 3], [0, 2, 0, 3], 4)["quadratic_weighted_kappa"].value
        closed = ordinal_metrics([0, 1, 1, 2], [0, 1, 0, 2], 3)["quadratic_weighted_kappa"].value
        assert with_gap != pytest.approx(closed)

    def test_one_grade_has_no_kappa(self):
        value = ordinal_metrics([2, 2], [2, 2], 4)["quadratic_weighted_kappa"]
        assert math.isnan(value.value)
        assert value.reason == "all grades and predictions are 2"

    def test_an_accuracy_of_one_has_the_interval_of_classification(self):
        grades = np.array([0, 1, 2, 1])
        measure = partial(weighted_ordinal_metrics, grades, grades, 3)
        interval = bootstrap_measures([measure], 4, 50, patients=["p", "p", "q", "r"], shares=["accuracy"])["accuracy"]
        as_classes = bootstrap_metrics(grades, np.eye(3)[grades], 50, patients=["p", "p", "q", "r"])["accuracy"]
        assert interval == as_classes
        assert (interval.method, interval.low) == ("exact", pytest.approx(0.025 ** (1 / 3)))

    def test_thresholds_are_fitted_on_the_validation_split_alone(self):
        scores, grades = [0.2, 0.3, 1.9, 2.6], [0, 1, 2, 2]
        for split in ("train", "test"):
            with pytest.raises(ValueError, match=f"must be fitted on the validation split, got {split}. HINT: "):
                fit_grade_thresholds(scores, grades, 3, split=split)
        fitted = fit_grade_thresholds(scores, grades, 3, split="validation")
        assert fitted.split == "validation"
        assert fitted.values == (0.25, 1.5)  # the second stays where it began
        assert grades_of_scores(scores, fitted).tolist() == grades
        assert grades_of_scores([0.25, 0.2500001], fitted).tolist() == [0, 1]

    @few
    @given(st.lists(st.tuples(st.integers(-2, 8), st.integers(0, 2)), min_size=1, max_size=9))
    def test_fitted_thresholds_are_never_worse_than_rounding_and_no_neighbour_is_better(self, rows):
        scores, grades = (np.array(column) for column in zip(*rows))
        scores = scores / 3.0

        def kappa(values):
            predicted = np.searchsorted(values, scores, side="left")
            return float(
                np.nan_to_num(ordinal_metrics(grades, predicted, 3)["quadratic_weighted_kappa"].value, nan=-9.0)
            )

        fitted = fit_grade_thresholds(scores, grades, 3, split="validation")
        if len(set(grades)) == 1:
            assert fitted.values == (0.5, 1.5)
            return
        reached = kappa(fitted.values)
        assert list(fitted.values) == sorted(fitted.values)
        assert reached >= kappa([0.5, 1.5]) - 1e-12
        for threshold in np.arange(-1, 3.5, 0.05):
            if threshold <= fitted.values[1]:
                assert kappa([threshold, fitted.values[1]]) <= reached + 1e-9
            if threshold >= fitted.values[0]:
                assert kappa([fitted.values[0], threshold]) <= reached + 1e-9

    def test_a_collapsed_score_keeps_the_thresholds_of_rounding(self):
        assert fit_grade_thresholds([1.0, 1.0], [0, 2], 3, split="validation").values == (0.5, 1.5)

    def test_wrong_grades_are_refused_by_name(self):
        with pytest.raises(ValueError, match=r"grades must lie in \[0, 3\), got -1 \(slide b\)"):
            ordinal_metrics([0, -1], [0, 1], 3, slide_ids=["a", "b"])
        with pytest.raises(ValueError, match="predicted must be integers, got float64"):
            ordinal_metrics([0, 1], [0.0, 1.0], 3)
        with pytest.raises(ValueError, match="n_grades must be at least 2, got 1"):
            ordinal_metrics([0], [0], 1)


class TestTable:
    def test_the_first_chooses_the_epoch(self):
        assert {kind: default_metric(kind).name for kind in METRICS} == {
            "classification": "auc",
            "regression": "pearson",
            "ordinal": "quadratic_weighted_kappa",
            "multilabel": "macro_auc",
            "survival": "c_index",
        }
        assert all(default_metric(kind).higher_is_better for kind in METRICS)

    def test_it_names_what_is_computed(self):
        assert {metric.name for metric in METRICS["classification"]} == set(METRIC_NAMES)
        assert [metric.name for metric in METRICS["regression"]] == list(regression_metrics([1, 2], [1, 2]))
        assert [metric.name for metric in METRICS["ordinal"]] == list(ordinal_metrics([0, 1], [0, 1], 2))
        for metrics in METRICS.values():
            assert len({metric.name for metric in metrics}) == len(metrics)
            assert all(metric.sentence.endswith(".") and metric.low < metric.high for metric in metrics)

    def test_errors_are_better_when_lower(self):
        lower = {(kind, m.name) for kind, metrics in METRICS.items() for m in metrics if m.higher_is_better is False}
        assert lower == {("regression", "mae"), ("regression", "rmse"), ("ordinal", "mae"), ("survival", "ibs")}
        assert is_better(metric_of("ordinal", "mae"), 0.5, 0.6)
        assert not is_better(metric_of("ordinal", "mae"), 0.6, 0.5)
        assert is_better(metric_of("survival", "c_index"), 0.6, 0.5)
        assert not is_better(metric_of("survival", "c_index"), 0.5, 0.5)

    def test_undefined_is_never_better(self):
        metric = metric_of("survival", "ibs")
        assert is_better(metric, 0.9, math.nan)
        assert not is_better(metric, math.nan, 0.9)
        assert not is_better(metric, math.nan, math.nan)
        with pytest.raises(ValueError, match="must have a better direction, got ibs_kaplan_meier"):
            is_better(metric_of("survival", "ibs_kaplan_meier"), 0.1, 0.2)

    def test_several_tasks_are_chosen_by_the_mean(self):
        values = {"grade": Measured(0.5), "os": Measured(0.7)}
        assert mean_of_defaults(values).value == pytest.approx(0.6)
        undefined = mean_of_defaults(values | {"til": Measured(math.nan, "all targets are 3")})
        assert math.isnan(undefined.value)
        assert undefined.reason == "undefined of til (all targets are 3)"
        with pytest.raises(ValueError, match="at least one task"):
            mean_of_defaults({})

    def test_other_names_are_refused_with_those_there_are(self):
        with pytest.raises(ValueError, match=r"of a survival task must be one of c_index, uno_c, .*, got 'auc'"):
            metric_of("survival", "auc")
        with pytest.raises(ValueError, match=r"kind of a task must be one of classification, .*, got 'cox'"):
            default_metric("cox")

    def test_a_value_without_a_number_must_have_a_reason(self):
        with pytest.raises(AssertionError, match="has a reason"):
            Measured(math.nan)
