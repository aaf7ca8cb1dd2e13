"""C, AUC and Brier score against other libraries' numbers, every pair by hand, and what must not change them.

Golden numbers: scikit-survival 0.28.0, lifelines 0.30.3 and torchsurv 0.2.0 on the cohort of survival_cohort.py. Where
two are named they agree, torchsurv to the float32 of its weights.
"""

import json
import math
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from survival_cohort import RISKS, SURVIVAL, TEST, TIMES, TRAINING, c_by_hand, censoring_by_hand, written_out

from ds_wsi.evaluation.bootstrap import bootstrap_measures, resample_counts
from ds_wsi.evaluation.task_metrics import concordance
from ds_wsi.evaluation.task_metrics.concordance import harrell_c, harrell_c_per_stratum, uno_c
from ds_wsi.evaluation.task_metrics.follow_up import FollowUp, default_times, follow_up
from ds_wsi.evaluation.task_metrics.kaplan_meier import censoring_curve
from ds_wsi.evaluation.task_metrics.over_time import reference_from_json, reference_to_json, training_reference
from ds_wsi.evaluation.task_metrics.survival import (
    SurvivalPredictions,
    survival_metrics,
    survival_over_time,
    survival_predictions,
    weighted_survival_metrics,
)
from ds_wsi.evaluation.task_metrics.table import METRICS

pytestmark = pytest.mark.filterwarnings("error")
G = censoring_curve(TRAINING)
REFERENCE = training_reference(TRAINING, TIMES)
PREDICTIONS = survival_predictions(TEST, RISKS, survival=SURVIVAL, strata=list("ab") * 12)
EXACT = {"rel": 0, "abs": 1e-12}


def test_c_is_other_libraries():
    assert harrell_c(TEST, RISKS).value == pytest.approx(0.7, **EXACT)  # scikit-survival, lifelines, torchsurv
    # scikit-survival; torchsurv has 0.67482877657 and 0.68639318370.
    assert uno_c(TEST, RISKS, G, tau=20).value == pytest.approx(0.6748287725639498, **EXACT)
    assert uno_c(TEST, RISKS, G, tau=35).value == pytest.approx(0.6863931806303776, **EXACT)
    assert uno_c(TEST, RISKS, G).value == pytest.approx(0.6863931806303776, **EXACT)  # scikit-survival without tau


def test_auc_and_brier_score_are_other_libraries():
    at_times = survival_over_time(PREDICTIONS, REFERENCE)
    # scikit-survival; torchsurv has the same to 1e-8, and its mean within 3e-8.
    auc = [0.6961626575028638, 0.8195553309542747, 0.7352042576493287, 0.7254918557668294]
    np.testing.assert_allclose(at_times.auc, auc, rtol=0, atol=1e-12)
    brier = [0.17722314398356295, 0.16736927036955165, 0.19864448655804035, 0.19832082692169403]
    np.testing.assert_allclose(at_times.brier, brier, rtol=0, atol=1e-12)
    values = survival_metrics(PREDICTIONS, REFERENCE)
    assert values["auc_t"].value == pytest.approx(0.7278594333692918, **EXACT)
    assert values["ibs"].value == pytest.approx(0.1867774515903493, **EXACT)
    # scikit-survival's score of its own Kaplan-Meier curve of the training split.
    assert values["ibs_kaplan_meier"].value == pytest.approx(0.231941672179483, **EXACT)
    assert {value.reason for value in values.values()} == {""}


cohorts = st.integers(2, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 6), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
        st.lists(st.integers(-2, 2), min_size=n, max_size=n),
        st.lists(st.integers(0, 3), min_size=n, max_size=n),
    )
)
trainings = st.lists(st.tuples(st.integers(1, 8), st.booleans()), min_size=1, max_size=12)
few = settings(max_examples=60, deadline=None, derandomize=True)


def made(cohort, training=None):
    times, events, risks, counts = cohort
    of = follow_up(np.array(times), np.array(events))
    risks = np.array(risks, dtype=np.float64)
    chances = np.exp(-np.outer(np.exp(risks / 2), np.array([1.0, 3.0, 4.0]) / 4))
    learnt = None if training is None else follow_up(*zip(*training, strict=True))
    reference = None if learnt is None else training_reference(learnt, np.array([1.0, 3.0, 4.0]))
    predictions = survival_predictions(of, risks, survival=chances, strata=[i % 2 for i in range(len(of))])
    return predictions, reference, learnt, np.array(counts)


def at_by_hand(of: FollowUp, risks, chances, g, time, column):
    """AUC(t) and the Brier score, slide by slide."""
    cases = [i for i in range(len(of)) if of.events[i] and of.times[i] <= time]
    controls = [i for i in range(len(of)) if of.times[i] > time]
    order = {1: 1.0, 0: 0.5, -1: 0.0}
    pairs = [(1 / g(of.times[i]), order[int(np.sign(risks[i] - risks[j]))]) for i in cases for j in controls]
    auc = sum(w * right for w, right in pairs) / sum(w for w, _ in pairs) if pairs else math.nan
    errors = [chances[i, column] ** 2 / g(of.times[i]) for i in cases]
    errors += [(1 - chances[i, column]) ** 2 / g(time) for i in controls]
    return auc, sum(errors) / len(of)


@few
@given(cohorts, trainings)
def test_every_pair_by_hand(cohort, training):
    predictions, reference, learnt, _ = made(cohort, training)
    of, risks = predictions.follow_up, predictions.risks
    values = survival_metrics(predictions, reference)
    assert values["c_index"].value == pytest.approx(c_by_hand(of, risks), nan_ok=True, **EXACT)
    stratified = c_by_hand(of, risks, strata=predictions.strata)
    assert values["c_index_stratified"].value == pytest.approx(stratified, nan_ok=True, **EXACT)

    g = partial(censoring_by_hand, learnt)
    end = learnt.times.max()

    def weight(time):
        return 1 / g(time) ** 2 if time <= end and g(time) > 0 else 0.0

    assert values["uno_c"].value == pytest.approx(c_by_hand(of, risks, weight), nan_ok=True, **EXACT)
    at_times = survival_over_time(predictions, reference)
    for column, time in enumerate(reference.times):
        if time > end or g(time) == 0:
            continue
        auc, brier = at_by_hand(of, risks, predictions.survival, g, time, column)
        assert at_times.auc[column] == pytest.approx(auc, nan_ok=True, **EXACT)
        assert at_times.brier[column] == pytest.approx(brier, **EXACT)


@few
@given(cohorts, trainings)
def test_counts_are_rows_written_out(cohort, training):
    predictions, reference, _, counts = made(cohort, training)
    assume(counts.any())
    rows = written_out(counts)
    repeated = SurvivalPredictions(
        predictions.follow_up.rows(rows), predictions.risks[rows], predictions.survival[rows], predictions.strata[rows]
    )
    expected = survival_metrics(repeated, reference)
    weighted = weighted_survival_metrics(predictions, reference, counts[None])
    assert weighted.keys() == expected.keys()
    for name, value in weighted.items():
        assert value[0] == pytest.approx(expected[name].value, nan_ok=True, rel=0, abs=1e-11), name


@few
@given(cohorts, trainings, st.permutations(range(12)))
def test_ranges_reasons_order_and_monotone_risks(cohort, training, order):
    predictions, reference, _, _ = made(cohort, training)
    values = survival_metrics(predictions, reference)
    for metric in METRICS["survival"]:
        value = values[metric.name]
        assert value.reason if math.isnan(value.value) else metric.low <= value.value <= metric.high, metric.name
    of, risks = predictions.follow_up, predictions.risks
    rows = np.array([row for row in order if row < len(of)])
    moved = SurvivalPredictions(of.rows(rows), risks[rows], predictions.survival[rows], predictions.strata[rows])
    bent = survival_predictions(of, np.exp(3 * risks) - 7, survival=predictions.survival)
    turned = survival_predictions(of, -risks, survival=predictions.survival)
    other = {name: survival_metrics(each, reference) for name, each in (("moved", moved), ("bent", bent))}
    other["turned"] = survival_metrics(turned, reference)
    for name in ("c_index", "uno_c", "auc_t"):
        value = values[name].value
        assert other["moved"][name].value == pytest.approx(value, nan_ok=True, **EXACT)
        assert other["bent"][name].value == pytest.approx(value, nan_ok=True, **EXACT)
        assert other["turned"][name].value == pytest.approx(1 - value, nan_ok=True, **EXACT)


def test_a_pair_of_one_time_is_comparable_with_the_censored_one_alone():
    assert harrell_c(follow_up([5, 5], [1, 0]), [2, 1]).value == 1
    assert harrell_c(follow_up([5, 5], [1, 0]), [1, 2]).value == 0
    both = harrell_c(follow_up([5, 5], [1, 1]), [2, 1])
    assert math.isnan(both.value)
    assert both.reason == "no pair of slides is comparable: nobody was followed for longer than the first event"
    assert harrell_c(follow_up([3, 5], [0, 1]), [2, 1]).reason == both.reason  # censored before the event
    assert harrell_c(follow_up([3, 5], [1, 0]), [1, 1]).value == 0.5
    assert harrell_c(follow_up([3, 5], [0, 0]), [1, 2]).reason == "no slide has an event"


def test_strata_are_compared_inside_alone():
    of = follow_up([1, 2, 3, 4], [1, 1, 1, 1])
    risks = [1, 0, 9, 8]  # right inside each of two centres, wrong between them
    assert harrell_c(of, risks, strata=["a", "a", "b", "b"]).value == 1
    assert harrell_c(of, risks).value == pytest.approx(2 / 6)
    each = harrell_c_per_stratum(of, risks, ["a", "a", "b", "c"])
    assert list(each) == ["a", "b", "c"]
    assert each["a"].value == 1
    assert math.isnan(each["b"].value)
    assert "of one stratum" in harrell_c(of, risks, strata=list("abcd")).reason


def test_blocks_of_pairs_change_nothing(monkeypatch: pytest.MonkeyPatch):
    (counts,) = resample_counts(24, 30, seed=0)
    whole = weighted_survival_metrics(PREDICTIONS, REFERENCE, counts)
    monkeypatch.setattr(concordance, "PAIRS", 50)  # two events at a time
    blocks = weighted_survival_metrics(PREDICTIONS, REFERENCE, counts)
    for name in whole:
        np.testing.assert_allclose(blocks[name], whole[name], rtol=0, atol=1e-13)


def test_the_censoring_is_the_training_splits():
    """Weights from the test split's own follow-up would give another C, AUC and Brier score."""
    by_itself = survival_metrics(PREDICTIONS, training_reference(TEST, TIMES))
    by_training = survival_metrics(PREDICTIONS, REFERENCE)
    for name in ("uno_c", "auc_t", "ibs", "ibs_kaplan_meier"):
        assert abs(by_itself[name].value - by_training[name].value) > 1e-5, name
    assert by_itself["c_index"] == by_training["c_index"]


def test_events_come_before_the_censoring_of_the_same_time():
    curve = censoring_curve(follow_up([2, 2, 4], [1, 0, 0]))
    assert curve.at([1.9, 2, 4, 4.1]).tolist() == [1, 0.5, 0, 0]  # of two exposed at 2 one is censored


def test_events_beyond_the_training_follow_up_are_left_out_and_named():
    """A library that raises here leaves a run without its metrics."""
    training = follow_up([1, 2, 3, 4], [1, 0, 1, 0])
    of = follow_up([1, 3, 4, 9, 10], [1, 1, 1, 1, 0])
    value = uno_c(of, [5, 4, 3, 2, 1], censoring_curve(training))
    assert value.value == 1
    assert value.reason == "left out: 2 events from 4 on, beyond the training split's G(t)"
    beyond = uno_c(of, [5, 4, 3, 2, 1], censoring_curve(training), tau=9.5)
    assert math.isnan(beyond.value)
    assert beyond.reason.startswith("an event at 4 lies before tau = 9.5, where the training split's censoring leaves")
    assert uno_c(of, [5, 4, 3, 2, 1], censoring_curve(training), tau=4).reason == ""
    assert "no event lies before tau" in uno_c(of, [5, 4, 3, 2, 1], censoring_curve(training), tau=1).reason
    # An event at 9 alone leaves no G: every case from there on, and no probability of being followed.
    late = survival_predictions(of, [5, 4, 3, 2, 1], survival=np.full((5, 2), 0.5))
    values = survival_metrics(late, training_reference(training, np.array([2.0, 9.5])))
    assert values["auc_t"].value == 1
    assert values["auc_t"].reason.startswith("left out: the times 9.5")
    assert math.isnan(values["ibs"].value)
    assert values["ibs"].reason.startswith("no Brier score at the times 9.5")


def test_tau_is_not_before_itself():
    of, flat = follow_up([1, 2, 3], [1, 1, 0]), censoring_curve(follow_up([9], [0]))
    risks = [2, 1, 3]  # the event at 2 is wrong, the one at 1 half right
    assert uno_c(of, risks, flat, tau=2).value == 0.5
    assert uno_c(of, risks, flat, tau=2.1).value == pytest.approx(1 / 3)


def test_the_mean_auc_is_weighted_by_the_drop_of_the_curve():
    at_times = survival_over_time(PREDICTIONS, REFERENCE)
    survival, last, drops = 1.0, 1.0, []
    for time in TIMES:
        survival = 1.0
        for earlier in sorted(set(TEST.times[TEST.events & (TEST.times <= time)])):
            survival *= 1 - np.sum(TEST.events & (TEST.times == earlier)) / np.sum(TEST.times >= earlier)
        drops.append(last - survival)
        last = survival
    expected = np.average(at_times.auc, weights=drops)
    assert survival_metrics(PREDICTIONS, REFERENCE)["auc_t"].value == pytest.approx(expected, **EXACT)
    assert abs(expected - at_times.auc.mean()) > 1e-3


def test_the_brier_score_is_integrated_over_uneven_times():
    brier = survival_over_time(PREDICTIONS, REFERENCE).brier
    expected = sum((brier[i] + brier[i + 1]) / 2 * (TIMES[i + 1] - TIMES[i]) for i in range(3)) / 24
    assert survival_metrics(PREDICTIONS, REFERENCE)["ibs"].value == pytest.approx(expected, **EXACT)
    assert abs(expected - brier.mean()) > 1e-3


def test_the_default_times_are_deciles_of_training_event_times():
    # numpy 2.4.6; 3 twice is one time.
    np.testing.assert_allclose(default_times(TRAINING), [3, 5.9, 8, 10.5, 13.6, 18.1, 20, 32.2])
    assert default_times(follow_up([1, 2], [0, 0])).size == 0


def test_what_is_undefined_has_a_reason():
    values = survival_metrics(PREDICTIONS)
    assert values["c_index"].reason == ""
    for name in ("uno_c", "auc_t", "ibs", "ibs_kaplan_meier"):
        assert math.isnan(values[name].value)
        assert values[name].reason == "the training split's follow-up is not known"
    values = survival_metrics(survival_predictions(TEST, RISKS), REFERENCE)
    assert values["ibs"].reason == "the model tells no survival probabilities"
    assert not math.isnan(values["ibs_kaplan_meier"].value)
    one = survival_metrics(
        survival_predictions(TEST, RISKS, survival=SURVIVAL[:, :1]), training_reference(TRAINING, TIMES[:1])
    )
    assert one["ibs"].reason == "an integral needs two times"
    untold = SURVIVAL.copy()
    untold[:, 3] = np.nan  # beyond the last finite edge of a discrete model
    values = survival_metrics(survival_predictions(TEST, RISKS, survival=untold), REFERENCE)
    assert values["ibs"].reason.startswith("no Brier score at the times 30:")


def test_a_training_split_without_events_has_no_times():
    reference = training_reference(follow_up([70, 80], [0, 0]))
    values = survival_metrics(survival_predictions(TEST, RISKS, survival=np.empty((24, 0))), reference)
    assert values["auc_t"].reason == values["ibs"].reason == "no slide of the training split has an event"
    assert values["uno_c"].value == values["c_index"].value == pytest.approx(0.7)  # nobody is censored before 70


def test_the_bootstrap_is_one_call():
    """Patients are drawn with their slides; every resample is the metrics of its slides written out."""
    patients = [f"p{row // 2}" for row in range(24)]
    measure = partial(weighted_survival_metrics, PREDICTIONS, REFERENCE)
    intervals = bootstrap_measures([measure], 24, 40, seed=3, patients=patients)
    assert list(intervals) == [metric.name for metric in METRICS["survival"]]
    samples = []
    for counts in next(resample_counts(12, 40, seed=3)):
        rows = written_out(np.repeat(counts, 2))
        samples.append(harrell_c(TEST.rows(rows), RISKS[rows]).value)
    interval = intervals["c_index"]
    assert interval.value == pytest.approx(0.7)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(samples, (0.025, 0.975))), abs=1e-12)
    turned = partial(weighted_survival_metrics, survival_predictions(TEST, -RISKS), None)
    two = bootstrap_measures(
        [partial(weighted_survival_metrics, survival_predictions(TEST, RISKS), None), turned], 24, 10
    )
    assert two["c_index"].value == pytest.approx(0.5)  # of two runs the mean
    with pytest.raises(ValueError, match="patients must have 24 names, got 2"):
        bootstrap_measures([measure], 24, patients=["a", "b"])


def test_a_reference_comes_back_from_json_with_every_bit():
    again = reference_from_json(json.loads(json.dumps(reference_to_json(REFERENCE), allow_nan=False)))
    assert survival_metrics(PREDICTIONS, again) == survival_metrics(PREDICTIONS, REFERENCE)
    with pytest.raises(ValueError, match=r"a training reference must have .*KeyError\('survival'\)"):
        reference_from_json({"censoring": {"times": [], "values": []}})


@pytest.mark.parametrize(
    ("times", "events", "message"),
    [
        ([1, -2], [0, 1], r"times must not be negative, got -2.0 \(slide b\)"),
        ([1, math.nan], [0, 1], r"times must be finite, got nan \(slide b\)"),
        ([1, 2], [0, -1], r"events must be 0 or 1, got .*-1.* \(slide b\)"),  # another table's missing value
        ([1, 2], [14, 30], r"events must be 0 or 1, got .*14.* \(slide a\)"),  # a column Event that holds months
        ([1, 2], [1], r"events must have shape \[2\], got \[1\]"),
        ([], [], r"times must hold at least one slide"),
    ],
)
def test_a_wrong_follow_up_is_refused_by_name(times, events, message):
    with pytest.raises(ValueError, match=message) as error:
        follow_up(times, events, ["a", "b"])
    assert "HINT: " in str(error.value)


@pytest.mark.parametrize(
    ("risks", "options", "message"),
    [
        ([1, math.inf], {}, r"risks must be finite, got inf \(slide b\)"),
        ([1], {}, r"risks must have shape \[2\]"),
        ([1, 2], {"survival": [[1], [1.5]]}, r"survival must lie in \[0, 1\], got 1.5 \(slide b\)"),
        ([1, 2], {"survival": [1, 1]}, r"survival must have shape \[2, T\], got \[2\]"),
        ([1, 2], {"strata": ["a"]}, r"strata must have shape \[2\], got \[1\]"),
    ],
)
def test_wrong_predictions_are_refused_by_name(risks, options, message):
    with pytest.raises(ValueError, match=message):
        survival_predictions(follow_up([1, 2], [1, 0]), risks, slide_ids=["a", "b"], **options)


def test_probabilities_at_other_times_are_refused():
    predictions = survival_predictions(TEST, RISKS, survival=SURVIVAL[:, :3])
    with pytest.raises(ValueError, match="one column per time of the reference, 4, got 3"):
        survival_metrics(predictions, REFERENCE)
    with pytest.raises(ValueError, match="tau must be above 0, got 0"):
        training_reference(TRAINING, tau=0)
    with pytest.raises(ValueError, match="times must be finite numbers"):
        training_reference(TRAINING, np.array([1.0, np.nan]))
