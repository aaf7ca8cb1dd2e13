"""Kaplan-Meier curves, the log-rank test, the hazard ratio and groups of risk, against other libraries and by hand.

Golden numbers: lifelines 0.30.3, scikit-survival 0.28.0 and statsmodels 0.15.0 on the cohort of survival_cohort.py.
"""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from survival_cohort import RISKS, TEST, TRAINING, TRAINING_RISKS, written_out

from ds_wsi.evaluation.task_metrics.follow_up import follow_up, per_patient
from ds_wsi.evaluation.task_metrics.hazard_ratio import hazard_ratio
from ds_wsi.evaluation.task_metrics.kaplan_meier import kaplan_meier, weighted_survival_at
from ds_wsi.evaluation.task_metrics.log_rank import log_rank
from ds_wsi.evaluation.task_metrics.risk_groups import (
    RiskCutoffs,
    compare_risk_groups,
    curve_rows,
    fit_risk_cutoffs,
    group_names,
    risk_group,
)

pytestmark = pytest.mark.filterwarnings("error")
HALVES = fit_risk_cutoffs(TRAINING_RISKS)
GROUPS = risk_group(RISKS, HALVES)
THIRDS = risk_group(RISKS, fit_risk_cutoffs(TRAINING_RISKS, 3))
few = settings(max_examples=60, deadline=None, derandomize=True)
cohorts = st.integers(2, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 6), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
        st.lists(st.integers(0, 2), min_size=n, max_size=n),
        st.lists(st.integers(0, 3), min_size=n, max_size=n),
    )
)


def test_the_curve_is_other_libraries():
    curve = kaplan_meier(TRAINING)
    chosen = np.searchsorted(curve.times, [1, 5, 10, 18, 24])
    # lifelines and scikit-survival; statsmodels has the first, second and fourth.
    survival = [0.975, 0.825, 0.6924009449602122, 0.5350370938328912, 0.4406187831564986]
    low = [0.835485459111506, 0.6676562263551091, 0.5216174659511622, 0.3588074330921208, 0.2720085259826232]
    high = [0.9964401830137299, 0.9124650822198502, 0.8125169027660879, 0.6827542233376507, 0.5969438094949948]
    np.testing.assert_allclose(curve.survival[chosen], survival, rtol=0, atol=1e-12)
    np.testing.assert_allclose(curve.low[chosen], low, rtol=0, atol=1e-12)
    np.testing.assert_allclose(curve.high[chosen], high, rtol=0, atol=1e-12)
    assert curve.median == 20  # lifelines


def test_the_curve_by_hand():
    curve = kaplan_meier(follow_up([2, 2, 3, 5, 7], [1, 0, 0, 1, 1]))
    assert curve.times.tolist() == [2, 3, 5, 7]
    assert curve.at_risk.tolist() == [5, 3, 2, 1]  # who is censored at 2 was at risk of the event at 2
    assert curve.censored.tolist() == [1, 1, 0, 0]
    np.testing.assert_allclose(curve.survival, [4 / 5, 4 / 5, 2 / 5, 0], atol=1e-15)
    assert np.isnan(curve.low).tolist() == np.isnan(curve.high).tolist() == [False, False, False, True]
    assert curve.median == 5
    assert curve.at_risk_at([0, 2, 2.5, 7, 8]).tolist() == [5, 5, 3, 1, 0]
    assert curve.steps.at([0, 1.9, 2, 6, 7, 9]).tolist() == pytest.approx([1, 1, 0.8, 0.4, 0, 0])
    unfinished = kaplan_meier(follow_up([1, 2, 3], [0, 1, 0]))
    assert (unfinished.low[0], unfinished.high[0]) == (1, 1)  # no event yet
    assert math.isnan(unfinished.steps.at(3.1))  # nobody was followed so long
    assert unfinished.median == 2
    assert math.isnan(kaplan_meier(follow_up([1, 2, 3], [0, 0, 1]).rows(np.array([0, 1]))).median)


def test_a_half_by_rounding_is_a_half():
    curve = kaplan_meier(follow_up(np.arange(1, 15), np.ones(14)))
    assert curve.median == 7


def test_the_log_rank_test_is_other_libraries():
    # lifelines, scikit-survival, statsmodels.
    given = [int(name) for name in "202222000000002102222022"]
    two, three = log_rank(TEST, GROUPS), log_rank(TEST, given)
    assert (two.statistic, two.p_value) == pytest.approx((4.669791109726618, 0.03069766102147986), abs=1e-12)
    assert (three.statistic, three.p_value) == pytest.approx((5.996995038551395, 0.04986192870242828), abs=1e-12)
    assert (two.degrees, three.degrees) == (1, 2)
    assert two.observed.sum() == pytest.approx(two.expected.sum())


@pytest.mark.parametrize(
    ("covariate", "ties", "coefficient", "error", "p_value", "interval"),
    [
        # statsmodels; lifelines agrees to 2e-11 (it has Efron alone), scikit-survival to the 8 digits that it shows.
        (GROUPS, "efron", 1.2177458957794993, 0.5965219808093727, 0.04121009815, (1.04978386214, 10.8797960316)),
        (GROUPS, "breslow", 1.2061598137184946, 0.5969698667310706, 0.04333464032, (1.03678064152, 10.7639140983)),
        (RISKS, "efron", 0.47118230399968203, 0.19829775213882858, 0.01749504279, (1.08602674860, 2.36277967990)),
        (RISKS, "breslow", 0.4675537681279684, 0.19856200296434248, 0.01853771026, (1.08153290753, 2.35544140408)),
    ],
)
def test_the_hazard_ratio_is_other_libraries(covariate, ties, coefficient, error, p_value, interval):
    ratio = hazard_ratio(TEST, covariate, ties=ties)
    assert (ratio.coefficient, ratio.standard_error) == pytest.approx((coefficient, error), abs=1e-9)
    assert ratio.ratio == pytest.approx(math.exp(coefficient), abs=1e-8)
    assert ratio.p_value == pytest.approx(p_value, abs=1e-9)
    assert (ratio.low, ratio.high) == pytest.approx(interval, abs=1e-7)


def log_likelihood(of, x, ties, coefficient):
    """Cox's partial likelihood, event by event."""
    total = 0.0
    for time in set(of.times[of.events]):
        tied = [i for i in range(len(of)) if of.events[i] and of.times[i] == time]
        at_risk = sum(math.exp(coefficient * x[i]) for i in range(len(of)) if of.times[i] >= time)
        of_tied = sum(math.exp(coefficient * x[i]) for i in tied)
        for position, i in enumerate(tied):
            share = position / len(tied) if ties == "efron" else 0
            total += coefficient * x[i] - math.log(at_risk - share * of_tied)
    return total


@few
@given(cohorts, st.sampled_from(["efron", "breslow"]))
def test_the_hazard_ratio_is_the_likelihoods_maximum_or_has_a_reason(cohort, ties):
    times, events, x, _ = cohort
    of = follow_up(np.array(times), np.array(events))
    ratio = hazard_ratio(of, x, ties=ties)
    if ratio.reason:
        assert math.isnan(ratio.ratio)
        # No maximum: the likelihood is flat, has no event, or still rises far out.
        inner, outer = (max(log_likelihood(of, x, ties, sign * far) for sign in (-1, 1)) for far in (8, 16))
        assert outer >= inner - 1e-9
        return
    best = minimize_scalar(lambda b: -log_likelihood(of, x, ties, b), bounds=(-12, 12), method="bounded")
    assert ratio.coefficient == pytest.approx(best.x, abs=1e-4)
    step = 1e-4
    at = [log_likelihood(of, x, ties, ratio.coefficient + k * step) for k in (-1, 0, 1)]
    assert ratio.standard_error == pytest.approx(step / math.sqrt(2 * at[1] - at[0] - at[2]), rel=1e-2)


def test_a_hazard_ratio_in_another_unit_and_far_from_zero():
    plain = hazard_ratio(TEST, RISKS)
    shifted = hazard_ratio(TEST, 1e6 + 1e3 * RISKS)
    assert shifted.coefficient * 1e3 == pytest.approx(plain.coefficient, abs=1e-8)
    assert shifted.p_value == pytest.approx(plain.p_value, abs=1e-8)


def test_a_covariate_far_from_all_others():
    """Newton's first steps go too far here; the maximum is where the plain likelihood has it."""
    n = 120
    times, events = np.arange(1, n + 1), np.ones(n, dtype=bool)
    x = np.zeros(n)
    x[0], x[1] = 100.0, 1.0  # the first two events
    x[-1] = 2.0
    ratio = hazard_ratio(follow_up(times, events), x)
    of = follow_up(times, events)
    best = minimize_scalar(lambda b: -log_likelihood(of, x, "efron", b), bounds=(-1, 5), method="bounded")
    assert ratio.coefficient == pytest.approx(best.x, abs=1e-4)


def test_a_likelihood_without_a_maximum_has_no_ratio():
    of = follow_up([1, 2, 3, 4], [1, 1, 0, 0])
    value = hazard_ratio(of, [1, 1, 0, 0])
    assert math.isnan(value.ratio)
    assert value.reason == "each event comes to the highest covariate at risk: the likelihood has no maximum"
    assert "the lowest covariate" in hazard_ratio(of, [0, 0, 1, 1]).reason
    assert hazard_ratio(of, [1, 1, 1, 1]).reason == "all slides at risk have the same covariate at each event"
    assert hazard_ratio(follow_up([1, 2], [0, 0]), [0, 1]).reason == "no slide has an event"


@few
@given(cohorts)
def test_counts_are_rows_written_out(cohort):
    times, events, groups, counts = map(np.array, cohort)
    assume(counts.any())
    of, rows = follow_up(times, events), written_out(counts)
    whole, weighted = kaplan_meier(of.rows(rows)), kaplan_meier(of, counts)
    for name in ("times", "at_risk", "events", "censored", "survival", "low", "high"):
        np.testing.assert_allclose(getattr(weighted, name), getattr(whole, name), rtol=0, atol=1e-12, err_msg=name)
    asked = np.array([0.5, 1, 3.5, 6])
    within = asked <= whole.times[-1]
    curves = weighted_survival_at(of, counts[None], asked)[0]
    np.testing.assert_allclose(curves[within], whole.steps.at(asked)[within], rtol=0, atol=1e-12)
    one, other = log_rank(of, groups, counts), log_rank(of.rows(rows), groups[rows])
    assert one.statistic == pytest.approx(other.statistic, nan_ok=True, abs=1e-9)
    assert one.reason == other.reason
    assert bool(one.reason) == math.isnan(one.p_value)
    assert not 0 > one.p_value > 1
    one, other = hazard_ratio(of, groups, counts), hazard_ratio(of.rows(rows), groups[rows])
    assert one.ratio == pytest.approx(other.ratio, nan_ok=True)


@few
@given(cohorts)
def test_the_log_rank_test_by_hand(cohort):
    times, events, groups, _ = map(np.array, cohort)
    groups = groups % 2
    excess = variance = 0.0
    for time in set(times[events]):
        n, n_one = np.sum(times >= time), np.sum((times >= time) & (groups == 1))
        d, d_one = np.sum((times == time) & events), np.sum((times == time) & events & (groups == 1))
        excess += d_one - d * n_one / n
        variance += d * (n_one / n) * (1 - n_one / n) * (n - d) / (n - 1) if n > 1 else 0
    test = log_rank(follow_up(times, events), groups)
    if variance > 0:
        assert test.statistic == pytest.approx(excess**2 / variance, abs=1e-9)
        assert test.p_value == pytest.approx(math.erfc(math.sqrt(test.statistic / 2)), abs=1e-9)
    else:
        assert test.reason


def test_cutoffs_are_the_training_splits_median():
    assert RiskCutoffs((0.1,), "train") == HALVES  # numpy's median of the 40 risks
    assert np.median(RISKS) != 0.1
    assert risk_group([0.1, 0.1 + 1e-12, -5], HALVES).tolist() == [0, 1, 0]  # equal is below
    assert group_names(HALVES) == ("low risk", "high risk")
    assert group_names(RiskCutoffs((1.0, 2.0, 3.0)))[3] == "risk group 4 of 4"
    assert fit_risk_cutoffs([1, 1, 1, 1], 4).values == (1.0,)  # equal quantiles are merged
    with pytest.raises(ValueError, match="cut-offs must not be fitted on the test split"):
        fit_risk_cutoffs(RISKS, split="test")
    with pytest.raises(ValueError, match="n_groups must be at least 2, got 1"):
        fit_risk_cutoffs(RISKS, 1)


def test_groups_cut_on_the_same_slides_have_no_p_value():
    """Risks learnt by heart part any slides; the curves may be looked at, a p-value would be believed."""
    same = compare_risk_groups(TRAINING, TRAINING_RISKS, HALVES, split="train")
    assert math.isnan(same.test.p_value)
    assert math.isnan(same.ratio.low)
    assert same.test.reason == same.ratio.reason
    assert same.test.reason == "the cut-offs were taken from this split, train: a p-value would be too small"
    assert not math.isnan(same.ratio.ratio)
    other = compare_risk_groups(TEST, RISKS, HALVES, split="test")
    assert other.test.p_value == pytest.approx(0.03069766102147986, abs=1e-12)
    assert other.ratio.ratio == pytest.approx(math.exp(1.2177458957794993), abs=1e-8)
    assert [curve.at_risk[0] for curve in other.curves.values()] == [11, 13]
    assert list(other.curves) == ["low risk", "high risk"]


def test_the_ratio_is_of_the_highest_against_the_lowest():
    thirds = fit_risk_cutoffs(TRAINING_RISKS, 3)
    value = compare_risk_groups(TEST, RISKS, thirds, split="test")
    ends = THIRDS != 1
    assert value.ratio.ratio == hazard_ratio(TEST.rows(ends), THIRDS[ends] == 2).ratio
    assert value.test.statistic == log_rank(TEST, THIRDS).statistic


@pytest.mark.parametrize(("risk", "which"), [(5.0, "lowest"), (-5.0, "highest")])
def test_one_group_alone_is_drawn_and_not_compared(risk, which):
    value = compare_risk_groups(TEST, np.full(24, risk), HALVES, split="test")
    assert len(value.curves) == 1
    assert value.test.reason == "all slides that events could come to are in one group"
    assert value.ratio.reason == f"no slide is in the group of the {which} risk"


def test_the_numbers_behind_the_curves():
    rows = curve_rows(compare_risk_groups(TEST, RISKS, HALVES, split="test").curves)
    assert list(rows[0]) == ["group", "times", "at_risk", "events", "censored", "survival", "low", "high"]
    assert rows[0]["group"] == "low risk"
    assert sum(row["events"] for row in rows) == TEST.events.sum()


def test_a_patients_slides_are_one_patient():
    """Every slide twice says no more than once: the test of slides has a p-value of twice the cohort."""
    twice = np.repeat(np.arange(24), 2)
    patients = [f"p{row}" for row in twice]
    noise = np.tile([-0.05, 0.05], 24)
    of, risks, names = per_patient(TEST.rows(twice), RISKS[twice] + noise, patients)
    np.testing.assert_allclose(risks, RISKS, atol=1e-12)
    assert names == tuple(f"p{row}" for row in range(24))
    once = log_rank(of, risk_group(risks, HALVES))
    assert once.p_value == pytest.approx(0.03069766102147986, abs=1e-12)
    assert log_rank(TEST.rows(twice), GROUPS[twice]).p_value < once.p_value / 4
    with pytest.raises(ValueError, match=r"got time 3, event 1 and time 3, event 0 \(patient p\)"):
        per_patient(follow_up([3, 3], [1, 0]), [1, 1], ["p", "p"])
    with pytest.raises(ValueError, match=r"patients must have shape \[24\], got \[1\]"):
        per_patient(TEST, RISKS, ["p"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hazard_ratio(TEST, RISKS, ties="exact"), "ties must be efron or breslow, got 'exact'"),
        (lambda: hazard_ratio(TEST, RISKS, np.full(24, 0.5)), "counts must be whole numbers"),
        (lambda: hazard_ratio(TEST, RISKS, confidence=1), r"confidence must be in \(0, 1\), got 1"),
        (lambda: kaplan_meier(TEST, confidence=95), r"confidence must be in \(0, 1\), got 95"),
        (lambda: hazard_ratio(TEST, RISKS[:3]), r"covariate must have shape \[24\], got \[3\]"),
        (lambda: log_rank(TEST, GROUPS[:3]), r"groups must have shape \[24\], got \[3\]"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
