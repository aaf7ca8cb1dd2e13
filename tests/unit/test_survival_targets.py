"""Survival's tables, bins, curves and baselines, and the traps of its losses."""

import json
import math
from dataclasses import asdict

import pytest
import torch

from ds_wsi.targets.baseline import Baseline, breslow_baseline
from ds_wsi.targets.cox import TIES, check_cox_steps, cox_step, cox_surrogate, few_events_chance
from ds_wsi.targets.hazards import TimeBins, hazard_loss, hazard_risk, hazard_survival, survival_curve, time_bins
from ds_wsi.targets.sums import MISSING
from ds_wsi.targets.survival_table import SurvivalTable, gather_table

NAN = math.nan


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def table_of(scores, times, events, strata=None, ids=None):
    return SurvivalTable.of(torch.as_tensor(scores), times, events, ids or range(len(times)), strata)


# ------------------------------------------------------------------------------------------------ Cox


def test_two_bags_by_hand():
    step = cox_step(table_of(doubles(0.0, math.log(3)), [1, 2], [True, True]))
    assert step.loss == pytest.approx((math.log(4) + 0) / 2, abs=1e-15)
    torch.testing.assert_close(step.gradient, doubles(1 / 4 - 1, 3 / 4 + 1 - 1) / 2, rtol=0, atol=1e-15)
    assert step.n_events == 2


def test_the_gradient_sums_to_zero_because_a_common_score_is_not_identifiable():
    step = cox_step(table_of(doubles(0.3, -1, 2, 0.1, 0.7), [2, 2, 2, 3, 1], [1, 1, 0, 1, 0]))
    assert abs(step.gradient.sum()) < 1e-15 < 0.1 < step.gradient.abs().max()


@pytest.mark.parametrize("ties", TIES)
def test_a_bag_censored_at_an_events_time_belongs_to_its_risk_set(ties):
    at_the_time = cox_step(table_of(doubles(0.0, 1.0), [4, 4], [True, False]), ties)
    later = cox_step(table_of(doubles(0.0, 1.0), [4, 5], [True, False]), ties)
    earlier = cox_step(table_of(doubles(0.0, 1.0), [4, 3], [True, False]), ties)
    assert at_the_time.loss == later.loss == pytest.approx(math.log(1 + math.e), abs=1e-15)
    assert torch.equal(at_the_time.gradient, later.gradient)
    assert earlier.loss == 0.0
    assert earlier.gradient.tolist() == [0.0, 0.0]


def test_the_loss_is_divided_by_events_and_not_by_distinct_times():
    step = cox_step(table_of(doubles(0.0, 0.0, 0.0, 0.0), [1, 1, 1, 1], [1, 1, 1, 1]), "breslow")
    assert step.loss == pytest.approx(math.log(4), abs=1e-15)  # by the one time it were 4 log 4
    efron = cox_step(table_of(doubles(0.0, 0.0, 0.0, 0.0), [1, 1, 1, 1], [1, 1, 1, 1]))
    assert efron.loss == pytest.approx(math.log(24) / 4, abs=1e-15)  # 4 3 2 1: they leave one by one


@pytest.mark.parametrize("ties", TIES)
def test_the_order_and_the_dealing_of_bags_change_no_bit(ties):
    generator = torch.Generator().manual_seed(3)
    n = 60
    scores = torch.randn(n, dtype=torch.float64, generator=generator)
    times = torch.randint(1, 9, (n,), generator=generator)
    events = torch.rand(n, generator=generator) < 0.6
    strata = torch.randint(0, 3, (n,), generator=generator)
    first = cox_step(table_of(scores, times, events, strata), ties)
    for _ in range(5):
        order = torch.randperm(n, generator=generator)
        step = cox_step(table_of(scores[order], times[order], events[order], strata[order], order.tolist()), ties)
        assert step.loss == first.loss
        assert torch.equal(step.gradient, first.gradient[order])


def test_in_the_order_given_the_bits_would_differ():
    """Else the test above would hold of any code: a sum of the same numbers in two orders."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(60, dtype=torch.float64, generator=generator)
    orders = [torch.randperm(60, generator=generator) for _ in range(5)]
    assert len({scores[order].logcumsumexp(0)[-1].item() for order in orders}) > 1


@pytest.mark.parametrize("ties", TIES)
def test_scores_of_any_size_are_finite_and_right(ties):
    scores, times, events = doubles(0.5, -0.25, 0.125, 0.75, 0.375), [1, 2, 2, 3, 3], [1, 1, 1, 0, 1]
    near = cox_step(table_of(scores, times, events), ties)
    for shift in (2.0**30, -(2.0**30)):  # these scores stay exact when it is added
        far = cox_step(table_of(scores + shift, times, events), ties)
        torch.testing.assert_close(far.gradient, near.gradient, rtol=0, atol=1e-15)
    # Shifted by the largest of all, the last risk sets would be sums of zeros.
    apart = cox_step(table_of(doubles(2000, 1000, 0, 0), [1, 2, 3, 3], [1, 1, 1, 0]), ties)
    assert apart.loss == pytest.approx(math.log(2) / 3, abs=1e-12)
    torch.testing.assert_close(apart.gradient, doubles(0, 0, -0.5, 0.5) / 3, rtol=0, atol=1e-12)
    tie = cox_step(table_of(doubles(1000, 0), [1, 1], [1, 1]), ties)
    assert tie.loss == pytest.approx((1000 - (math.log(2) if ties == "efron" else 0)) / 2, abs=1e-12)


def test_a_score_that_is_not_finite_is_told_by_the_gradient():
    for value in (math.inf, NAN):
        assert cox_step(table_of(doubles(value, 0.0), [2, 1], [1, 1])).gradient.isnan().any()


def test_strata_have_risk_sets_of_their_own_and_share_the_number_of_events():
    scores, times, events = doubles(0.3, 1.0, -0.5, 0.8), [1, 2, 1, 2], [1, 1, 1, 0]
    step = cox_step(table_of(scores, times, events, [7, 7, -1, -1]))
    apart = [cox_step(table_of(scores[part], times[part], events[part])) for part in (slice(2), slice(2, 4))]
    assert step.n_events == 3
    assert step.loss == pytest.approx((2 * apart[0].loss + apart[1].loss) / 3, abs=1e-15)
    expected = torch.cat([2 * apart[0].gradient, apart[1].gradient]) / 3
    torch.testing.assert_close(step.gradient, expected, rtol=0, atol=1e-15)
    assert (step.gradient - cox_step(table_of(scores, times, events)).gradient).abs().max() > 0.01


@pytest.mark.parametrize("events", [[0, 0, 0], [1, 1, 1]])
def test_a_step_without_events_or_targets_gives_zeros_that_stay_connected(events):
    times = [1.0, 2.0, 3.0] if not any(events) else [NAN, NAN, NAN]
    head = torch.nn.Linear(2, 1)
    scores = head(torch.randn(3, 2))
    step = cox_step(table_of(scores, times, events))
    assert (step.loss, step.n_events) == (0.0, 0)
    cox_surrogate(scores, step.gradient).backward()
    assert [parameter.grad.abs().sum().item() for parameter in head.parameters()] == [0.0, 0.0]


def test_a_bag_without_a_target_is_in_no_risk_set():
    step = cox_step(table_of(doubles(0.3, 5.0, 1.0), [1, NAN, 2], [1, 1, 1]))
    alone = cox_step(table_of(doubles(0.3, 1.0), [1, 2], [1, 1]))
    assert (step.loss, step.n_events) == (alone.loss, 2)
    assert step.gradient[1] == 0
    assert torch.equal(step.gradient[[0, 2]], alone.gradient)


def test_one_bag_is_refused_before_and_in_the_step():
    with pytest.raises(ValueError, match=r"two bags or more for a Cox loss, got 1.*HINT: --bags_per_step 64"):
        cox_step(table_of(doubles(0.3), [1], [1]))
    with pytest.raises(ValueError, match=r"got 1 in step 3 of 3\. HINT: --bags_per_step"):
        check_cox_steps([64, 64, 1])
    check_cox_steps([64, 64, 2])
    empty = cox_step(table_of(torch.zeros(0), [], []))  # a rank of a group in which nobody has a bag
    assert (empty.loss, empty.gradient.shape) == (0.0, (0,))


def test_steps_with_few_events_are_foreseen():
    assert few_events_chance(0.5, 3) == (0.125, 0.375)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_have_the_gradient_of_what_they_are(dtype):
    scores = torch.tensor([[0.31], [-1.2], [2.7], [0.9]], dtype=dtype, requires_grad=True)
    times, events = [1, 2, 2, 3], [1, 1, 1, 1]
    step = cox_step(table_of(scores, times, events))
    exact = cox_step(table_of(scores.detach().double(), times, events))
    assert torch.equal(step.gradient, exact.gradient)
    surrogate = cox_surrogate(scores, step.gradient)
    assert surrogate.dtype is torch.float32
    surrogate.backward()
    assert torch.equal(scores.grad, exact.gradient.to(dtype)[:, None])


def test_a_loss_scale_multiplies_the_surrogate_once():
    scores = doubles(0.3, 1.0, -0.5).requires_grad_()
    step = cox_step(table_of(scores, [1, 2, 3], [1, 1, 0]))
    (2.0**10 * cox_surrogate(scores, step.gradient)).backward()
    assert torch.equal(scores.grad / 2**10, step.gradient)


def test_a_surrogate_is_of_its_own_bags():
    with pytest.raises(ValueError, match=r"one number per bag of the stack, \[2\], got \[3\]\. HINT: split"):
        cox_surrogate(torch.zeros(2), torch.zeros(3))


def test_wrong_tables_are_refused():
    with pytest.raises(ValueError, match=r"ties must be one of efron, breslow, got 'exact'"):
        cox_step(table_of(doubles(0, 1), [1, 2], [1, 1]), "exact")
    with pytest.raises(ValueError, match=r"ids must differ within a step, got 5 more than once\. HINT: where"):
        cox_step(table_of(doubles(0, 1), [1, 2], [1, 1], ids=[5, 5]))
    for time in (0.0, -3.0, math.inf):
        with pytest.raises(ValueError, match=rf"times must be finite and positive, got {time:g} \(bag 9\)\. HINT"):
            table_of(doubles(0, 1), [1, time], [1, 1], ids=[8, 9])
    with pytest.raises(ValueError, match=r"events must be one per score, \[2\], got \[3\]"):
        table_of(doubles(0, 1), [1, 2], [1, 1, 0])
    with pytest.raises(ValueError, match=r"outputs must be one per bag, \[B\] or \[B, 1\], got \[2, 2\]"):
        table_of(torch.zeros(2, 2), [1, 2], [1, 1])


def test_one_process_gathers_its_own():
    alone = table_of(torch.zeros(3, 1, requires_grad=True), [1, 2, 3], [1, 0, 1])
    table, rows = gather_table(alone)
    assert not table.scores.requires_grad
    assert (len(table), rows) == (3, slice(0, 3))


# ------------------------------------------------------------------------------------------------ baseline


def test_a_baseline_by_hand_and_the_curve_it_gives():
    table = table_of(doubles(0.0, math.log(3), 0.0, 0.0), [1, 2, 2, 4], [1, 1, 1, 0])
    (baseline,) = breslow_baseline(table).values()
    hazards = [1 / 6, 1 / 6 + 2 / 5]
    assert baseline.times == (1.0, 2.0)
    assert [math.exp(value) for value in baseline.log_hazards] == pytest.approx(hazards, abs=1e-15)
    curve = baseline.survival(doubles(0.0, math.log(2)), doubles(0.5, 1, 1.9, 2, 4, 4.1))
    of_the_first = [1, *(math.exp(-h) for h in (hazards[0], hazards[0], hazards[1], hazards[1]))]
    torch.testing.assert_close(curve[0, :5], doubles(*of_the_first), rtol=0, atol=1e-15)
    torch.testing.assert_close(curve[1, :5], doubles(*of_the_first) ** 2, rtol=0, atol=1e-15)
    assert curve[:, 5].isnan().all()  # nobody was observed so long


def test_a_baseline_survives_json_and_scores_that_no_exponential_holds():
    near = table_of(doubles(0.0, 1.0, 0.5), [1, 2, 3], [1, 1, 1])
    far = table_of(doubles(0.0, 1.0, 0.5) + 900, [1, 2, 3], [1, 1, 1])
    curves = []
    for table in (near, far):
        (baseline,) = breslow_baseline(table).values()
        values = json.loads(json.dumps(asdict(baseline), allow_nan=False))
        again = Baseline(tuple(values["times"]), tuple(values["log_hazards"]), values["last_time"])
        assert again == baseline
        curves.append(again.survival(table.scores, doubles(1, 2, 3)))
    torch.testing.assert_close(curves[0], curves[1], rtol=0, atol=1e-12)


def test_each_stratum_has_its_baseline_and_needs_an_event():
    scores, times = doubles(0.2, 0.4, -0.3, 1.0), [1, 2, 1, 3]
    baselines = breslow_baseline(table_of(scores, times, [1, 0, 1, 1], [4, 4, 2, 2]))
    assert sorted(baselines) == [2, 4]
    (alone,) = breslow_baseline(table_of(scores[2:], times[2:], [1, 1])).values()
    assert baselines[2] == alone
    with pytest.raises(ValueError, match=r"got none in stratum 4, which has 2 bags\. HINT"):
        breslow_baseline(table_of(scores, times, [0, 0, 1, 1], [4, 4, 2, 2]))


# ------------------------------------------------------------------------------------------------ hazards


def test_bins_are_quantiles_of_event_times_and_borders_end_a_bin():
    times, events = [*range(1, 9), 100, 200], [1] * 8 + [0, 0]
    bins = time_bins(times, events)
    assert bins == TimeBins((2.0, 4.0, 6.0), 4)  # not moved by the censored
    assert (bins.n_bins, bins.shortfall) == (4, "")
    assert bins.bin_of(doubles(0.5, 2, 2.5, 4, 6, 6.5, 1e9, NAN)).tolist() == [0, 0, 1, 1, 2, 3, 3, MISSING]


@pytest.mark.parametrize("times", [[3, 3, 3, 3, 5, 7, 7, 7], [1, 10], [1, 2, 3], [4, 4, 4, 9, 9, 9]])
def test_equal_times_make_fewer_bins_and_it_is_said(times):
    bins = time_bins(times, [1] * len(times))
    assert bins.n_bins < 4
    assert bins.shortfall == (
        f"{bins.n_bins} time bins instead of 4: quantiles of the training split's event times coincide"
    )
    assert set(bins.bin_of(doubles(*times)).tolist()) == set(range(bins.n_bins)), "a bin without an event"


def test_one_time_is_one_bin():
    bins = time_bins([3, 3, NAN], [1, 1, 1])
    assert (bins.borders, bins.bin_of(doubles(1, 5)).tolist()) == ((), [0, 0])
    assert "1 time bin instead of 4" in bins.shortfall
    assert survival_curve(torch.zeros(2, 1), bins, doubles(0, 1)).isnan().tolist() == [[False, True]] * 2


def test_no_event_is_refused():
    with pytest.raises(ValueError, match=r"an event to bin times by, got none in 3 bags.*--censorship_column"):
        time_bins([1, 2, NAN], [0, 0, 1])
    with pytest.raises(ValueError, match=r"two or more, got 1\. HINT: --time_bins 4"):
        time_bins([1, 2], [1, 1], 1)


def test_hazards_by_hand():
    logits = doubles(0.4, -0.3, 1.1)[None]
    h = logits[0].sigmoid().tolist()
    one = torch.tensor([1])
    seen = hazard_loss(logits, one, torch.tensor([True])).item()
    assert seen == pytest.approx(-math.log(1 - h[0]) - math.log(h[1]), abs=1e-15)
    censored = [hazard_loss(logits, one, torch.tensor([False]), alpha=alpha).item() for alpha in (0.0, 0.25, 1.0)]
    through = -math.log(1 - h[0]) - math.log(1 - h[1])
    assert censored == pytest.approx([through, 0.75 * through, 0], abs=1e-15)
    # The chances of an event in each bin and of none at all are all there is.
    chances = [math.exp(-hazard_loss(logits, torch.tensor([k]), torch.tensor([True]))) for k in range(3)]
    none = math.exp(-hazard_loss(logits, torch.tensor([2]), torch.tensor([False])))
    assert sum(chances) + none == pytest.approx(1, abs=1e-15)


def test_alpha_is_the_published_mixture():
    """(1 - alpha) times the whole likelihood, and alpha times the part of the bags whose event was seen."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 4, dtype=torch.float64, generator=generator)
    bins, events = torch.randint(0, 4, (9,), generator=generator), torch.rand(9, generator=generator) < 0.5
    whole, seen = hazard_loss(logits, bins, events), hazard_loss(logits[events], bins[events], events[events])
    expected = 0.6 * whole + 0.4 * seen
    torch.testing.assert_close(hazard_loss(logits, bins, events, alpha=0.4), expected, rtol=0, atol=1e-14)


def clamped(logits, bins, events, least=1e-7):
    """The loss as it is often written: of hazards that are clamped."""
    hazards = logits.sigmoid()
    padded = torch.cat([torch.ones_like(hazards[:, :1]), (1 - hazards).cumprod(1)], dim=1)
    columns = bins[:, None]
    seen = -padded.gather(1, columns).clamp(min=least).log() - hazards.gather(1, columns).clamp(min=least).log()
    return torch.where(events, seen[:, 0], -padded.gather(1, columns + 1)[:, 0].clamp(min=least).log()).sum()


def test_a_tiny_hazard_keeps_its_gradient_and_clamped_it_loses_it():
    bins, events = torch.tensor([0, 1]), torch.tensor([True, False])
    gradients = []
    for loss in (hazard_loss, clamped):
        logits = doubles(-20, 0.3, 0.4, 19).reshape(2, 2).requires_grad_()
        loss(logits, bins, events).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(gradients[0][0, 0].item(), -1.0, rtol=0, atol=1e-8)
    assert gradients[1][0, 0] == 0  # though this bag's event was seen where the model says it cannot be
    torch.testing.assert_close(gradients[0][1, 1].item(), 1.0, rtol=0, atol=1e-8)
    assert gradients[1][1, 1] == 0


def test_hazards_far_from_a_half_are_exact_in_float32():
    logits = torch.tensor([[0.0, 20.0], [0.0, -20.0]], requires_grad=True)
    hazard_loss(logits, torch.tensor([1, 1]), torch.tensor([True, False])).backward()
    tiny = torch.sigmoid(doubles(-20.0)).item()
    torch.testing.assert_close(logits.grad[:, 1].double(), doubles(-tiny, tiny), rtol=1e-6, atol=0)


def test_bags_without_a_target_are_in_no_sum():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, dtype=torch.float64, generator=generator).requires_grad_()
    bins, events = torch.tensor([1, MISSING, 2, MISSING]), torch.tensor([True, True, False, False])
    loss = hazard_loss(logits, bins, events)
    assert loss.item() == pytest.approx(hazard_loss(logits[::2], bins[::2], events[::2]).item(), abs=1e-15)
    loss.backward()
    assert logits.grad[1::2].abs().max() == 0 < logits.grad[::2].abs().amax(1).min()
    weighted = hazard_loss(logits, bins, events, weights=doubles(2, 9, 0.5, 9))
    apart = [hazard_loss(logits[[row]], bins[[row]], events[[row]]).item() for row in (0, 2)]
    assert weighted.item() == pytest.approx(2 * apart[0] + 0.5 * apart[1], abs=1e-14)


def test_a_bin_that_is_not_there_is_an_error():
    for wrong in (3, -1):
        with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
            hazard_loss(torch.zeros(1, 3), torch.tensor([wrong]), torch.tensor([True]))
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 1\.5\. HINT"):
        hazard_loss(torch.zeros(1, 3), torch.tensor([0]), torch.tensor([True]), alpha=1.5)


def test_risk_and_survival():
    logits = doubles(0.0, 0.0, -1.0, 2.0).reshape(2, 2)
    survival = hazard_survival(logits)
    h = logits[1].sigmoid()
    torch.testing.assert_close(survival, torch.stack([doubles(0.5, 0.25), (1 - h).cumprod(0)]), rtol=0, atol=1e-15)
    torch.testing.assert_close(hazard_risk(logits), -survival.sum(1), rtol=0, atol=0)
    assert hazard_risk(doubles(3, 3, -3, -3).reshape(2, 2)).diff() < 0  # the larger hazards are the larger risk


def test_the_survival_curve_is_linear_between_borders_and_undefined_after_the_last():
    logits, bins = torch.zeros(1, 3), TimeBins((2.0, 6.0), 3)
    curve = survival_curve(logits, bins, doubles(0, 1, 2, 3, 6, 6.1))
    torch.testing.assert_close(curve[0, :5], doubles(1, 0.75, 0.5, 0.4375, 0.25), rtol=0, atol=1e-15)
    assert curve[0, 5].isnan()
    with pytest.raises(ValueError, match=r"logits must be of 3 time bins, got \[1, 2\]"):
        survival_curve(torch.zeros(1, 2), bins, doubles(1))
