"""Metrics of multi-label tasks against other libraries."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from metric_columns import columns, few
from sklearn import metrics as sk
from survival_cohort import numbers, written_out

from ds_wsi.evaluation.task_metrics.measured import Measured
from ds_wsi.evaluation.task_metrics.multilabel import (
    fit_label_thresholds,
    multilabel_metrics,
    weighted_multilabel_metrics,
)
from ds_wsi.evaluation.task_metrics.table import LABEL_METRICS, METRICS

pytestmark = pytest.mark.filterwarnings("error")


class TestMultilabel:
    NAMES = ("a", "b", "c")
    SCORES = numbers(
        "-0.4 -0.1 1.3  -0.5 -1.3 -1.8  -0.2 -0.4 0.3  -0.5 -0.5 -0.7  -0.5 0.2 -0.4  0.1 1.9 0.5  -1.6 1.7 0.3 "
        "-0.9 0.9 0.0  -0.6 -0.6 -1.0  0.0 1.1 -0.3  0.4 1.9 -1.2  0.3 -0.3 -1.1  -1.0 -0.0 0.4  -0.5 0.1 0.7 "
        "0.3 0.9 0.5  0.5 1.8 0.6"
    ).reshape(16, 3)
    TARGETS = numbers(
        "0 nan 0  0 0 0  1 0 0  1 1 0  1 0 0  nan 1 1  0 nan nan  0 0 1  1 1 0  0 1 nan  0 0 1  1 0 0  nan 0 0  0 1 1 "
        "0 1 1  1 1 nan"
    ).reshape(16, 3)

    def test_other_libraries(self):
        values = {
            name: value.value for name, value in multilabel_metrics(self.TARGETS, self.SCORES, self.NAMES).items()
        }
        # scikit-learn 1.9.1 of the known cells; torchmetrics 1.9.0 agrees in float32.
        expected = {
            "macro_auc": 0.6200538548752835,
            "map": 0.5908286158286158,
            "micro_auc": 0.642512077294686,
            "auc_a": 0.5729166666666667,
            "ap_a": 0.5681818181818181,
            "auc_b": 0.6122448979591837,
            "ap_b": 0.6066849816849816,
            "auc_c": 0.675,
            "ap_c": 0.5976190476190476,
        }
        assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-14)
        assert values["prevalence_a"] == 6 / 14
        assert list(values)[:3] == [metric.name for metric in METRICS["multilabel"]]
        assert [f"{metric.name}_a" for metric in LABEL_METRICS] == list(values)[3:6]

    @few
    @given(
        columns(
            *(st.sampled_from([0.0, 1.0, math.nan]),) * 2,
            *(st.integers(-2, 2),) * 2,
            st.integers(0, 3),
        )
    )
    def test_counts_are_rows_written_out_as_libraries_have_them(self, drawn):
        counts = drawn[4]
        assume(counts.any())
        targets, scores = np.stack(drawn[:2], axis=1), np.stack(drawn[2:4], axis=1).astype(float)
        weighted = weighted_multilabel_metrics(targets, scores, ("a", "b"), counts[None])
        rows = written_out(counts)
        values = multilabel_metrics(targets[rows], scores[rows], ("a", "b"))
        assert values.keys() == weighted.keys()
        each = {"auc": [], "ap": []}
        for column, name in enumerate("ab"):
            is_known = np.isfinite(targets[rows, column])
            x, y = targets[rows, column][is_known], scores[rows, column][is_known]
            both = len(set(x)) == 2
            for kind, function in (("auc", sk.roc_auc_score), ("ap", sk.average_precision_score)):
                expected = function(x, y) if both else math.nan
                each[kind] += [expected] if both else []
                assert weighted[f"{kind}_{name}"][0] == pytest.approx(expected, nan_ok=True, abs=1e-12)
                assert bool(values[f"{kind}_{name}"].reason) != both
            assert (f"{name} (" in values["macro_auc"].reason) != both
        for name, kind in (("macro_auc", "auc"), ("map", "ap")):
            expected = np.mean(each[kind]) if each[kind] else math.nan
            assert weighted[name][0] == pytest.approx(expected, nan_ok=True, abs=1e-12)
        is_known = np.isfinite(targets[rows])
        x, y = targets[rows][is_known], scores[rows][is_known]
        expected = sk.roc_auc_score(x, y) if len(set(x)) == 2 else math.nan
        assert weighted["micro_auc"][0] == pytest.approx(expected, nan_ok=True, abs=1e-12)
        for name, value in values.items():
            assert value.value == pytest.approx(weighted[name][0], nan_ok=True, abs=1e-12)

    def test_a_label_of_one_kind_is_left_out_and_named(self):
        targets = self.TARGETS.copy()
        targets[:, 1], targets[:, 2] = 1, math.nan
        values = multilabel_metrics(targets, self.SCORES, self.NAMES)
        assert values["auc_b"].reason == values["ap_b"].reason == "the label is 1 on all slides"
        assert math.isnan(values["auc_b"].value)
        assert values["prevalence_b"] == Measured(1.0)
        assert values["prevalence_c"].reason == "the label is missing on all slides"
        assert values["macro_auc"].value == pytest.approx(0.5729166666666667)
        assert values["macro_auc"].reason == "left out: b (1 on all slides), c (missing on all slides)"
        assert values["map"].value == pytest.approx(0.5681818181818181)
        nothing = multilabel_metrics(np.full((2, 1), math.nan), np.zeros((2, 1)), ["a"])
        assert all(math.isnan(value.value) and value.reason for value in nothing.values())

    def test_a_missing_label_is_no_negative(self):
        as_negatives = multilabel_metrics(np.nan_to_num(self.TARGETS), self.SCORES, self.NAMES)
        assert as_negatives["macro_auc"].value != pytest.approx(0.6200538548752835, abs=1e-3)

    def test_youden_thresholds_are_of_the_validation_split(self):
        with pytest.raises(ValueError, match="must be fitted on the validation split, got test"):
            fit_label_thresholds(self.TARGETS, self.SCORES, self.NAMES, split="test")
        fitted = fit_label_thresholds(self.TARGETS, self.SCORES, self.NAMES, split="validation")
        # scikit-learn 1.9.1 has the same but for b, where its rounding parts three equal ones, and 0.1 wins.
        assert fitted.values == (-0.6, 1.1, 0.5)
        targets = self.TARGETS.copy()
        targets[:, 1] = 0
        fitted = fit_label_thresholds(targets, self.SCORES, self.NAMES, split="validation")
        assert math.isnan(fitted.values[1])
        assert fitted.reasons == (("b", "0 on all slides"),)

    @few
    @given(columns(st.sampled_from([0.0, 1.0]), st.integers(-3, 3)))
    def test_no_other_threshold_has_more_sensitivity_and_specificity(self, drawn):
        targets, scores = drawn
        assume(len(set(targets)) == 2)

        def youden(threshold):
            called = scores >= threshold
            return called[targets == 1].mean() + (~called)[targets == 0].mean() - 1

        threshold = fit_label_thresholds(targets[:, None], scores[:, None], ["a"], split="validation").values[0]
        assert youden(threshold) >= max(youden(other) for other in range(-4, 5)) - 1e-12
        assert all(youden(other) < youden(threshold) - 1e-12 for other in scores if other > threshold)

    @pytest.mark.parametrize(
        ("targets", "scores", "names", "message"),
        [
            ([[1, 2]], [[0, 0]], "ab", r"targets must be 0, 1 or NaN, got 2.0 \(slide s, label b\)"),
            ([[1, 0]], [[0, math.nan]], "ab", r"scores must be finite, got nan \(slide s, label b\)"),
            ([[1, 0]], [[0]], "ab", r"scores must have shape \[N, 2\], got \[1, 1\]"),
            ([[1, 0]], [[0, 0]], "aa", "label_names must be at least one, each once, got a, a"),
            (np.empty((0, 1)), np.empty((0, 1)), "a", "at least one slide"),
        ],
    )
    def test_wrong_tables_are_refused_by_name(self, targets, scores, names, message):
        with pytest.raises(ValueError, match=message):
            multilabel_metrics(targets, scores, list(names), slide_ids=["s"])
