"""Cox's loss and its gradient in closed form against autograd of a plain loss, and against other people's numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_wsi.targets.baseline import breslow_baseline
from ds_wsi.targets.cox import TIES, cox_step, cox_surrogate
from ds_wsi.targets.survival_table import SurvivalTable

# 16 bags with ties of events, and of events and censored, in two strata.
SCORES = [0.3, -1.2, 0.8, 2.1, -0.4, 0.0, 1.5, -2.3, 0.9, -0.7, 1.1, 0.2, -1.6, 0.6, -0.1, 1.8]
TIMES = [5, 3, 3, 1, 7, 3, 2, 9, 2, 7, 1, 5, 7, 3, 2, 3]
EVENTS = [1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 1]
STRATA = [0, 0, 1, 1, 0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 1, 0]
# statsmodels 0.15.0: PHReg(TIMES, numpy.eye(16), status=EVENTS, ties=..., strata=...), whose parameters are the scores:
# loglike(SCORES) and score(SCORES), by (ties, whether stratified).
STATSMODELS = {
    ("efron", False): (
        -19.57897922509603,
        *(-0.01576753679149656, 0.8938961171451858, -1.1238850173404422, 0.6215628335014527),
        *(-0.33915869575956903, 0.647722702965675, 0.4133969349033756, -0.256900641606313),
        *(-0.3816577846450989, 0.007926837796946078, 0.8607807466700104, -0.919104475315164),
        *(-0.5173343625856155, 0.3581089141230047, 0.8815668837119993, -1.1311534567739507),
    ),
    ("breslow", False): (
        -21.488052109240776,
        *(0.1218753739537205, 0.8786109875707221, -0.8969502226337237, 0.5259845383520982),
        *(-0.34864696168481724, 0.5969742855992778, 0.35491186898567684, -0.201715263878),
        *(-0.35403187260680824, 0.0008977575168487156, 0.8256194568623467, -0.7945600193455079),
        *(-0.4062046587724443, 0.2656392687496279, 0.869758952548528, -1.438163491217546),
    ),
    ("efron", True): (
        -13.776430648258676,
        *(-0.07260722527063142, 0.8987950895204384, -0.9973125482706626, 0.4750095408060052),
        *(-0.5326409848098773, 0.5518785857844366, 0.4809445121620192, -0.17044928087590147),
        *(-0.49101021733704425, 0.15575918510682935, 0.8410527569926001, -0.9705351522805928),
        *(-0.3432427008502424, 0.38774596993118104, 0.8193674356365798, -1.0327549662451374),
    ),
    ("breslow", True): (
        -14.69794827826986,
        *(0.07247023346342167, 0.8859559541435613, -0.9973125482706626, 0.4750095408060052),
        *(-0.46059765089114185, 0.5518785857844366, 0.4809445121620192, -0.17044928087590147),
        *(-0.49101021733704425, 0.15575918510682935, 0.8410527569926001, -0.8392636391044538),
        *(-0.3432427008502424, 0.3100737271532016, 0.8193674356365798, -1.2906358939192084),
    ),
}
# lifelines 0.30.3: CoxPHFitter().fit of one covariate, SCORES, with precision 1e-14 (its ties are Efron's): the
# coefficient, log_likelihood_, and of each stratum, at its event times, baseline_cumulative_hazard_ (of the centred
# covariate).
LIFELINES = {
    False: (
        1.0010993813140838,
        -19.578974958126004,
        {0: [0.06993734549142239, 0.1734583970026557, 0.4857547651606483, 0.784406538364735, 2.4283616659509137]},
    ),
    True: (
        0.9053204217740098,
        -13.749984706957392,
        {
            0: [0.06985929402885067, 0.15298423139372486, 0.49588816541610087, 0.8654238671995638, 2.5675459350017835],
            1: [0.0857502865917456, 0.2520547061350902, 0.5517997586366276, 1.882993934550301],
        },
    ),
}


def table_of(scores, times, events, strata):
    return SurvivalTable.of(torch.as_tensor(scores, dtype=torch.float64), times, events, range(len(times)), strata)


def plain_loss(scores, times, events, strata, ties):
    """The formula, event time by event time, of differentiable scores; None without an event."""
    terms, n_events = [], 0
    for stratum in sorted(set(strata)):
        rows = [row for row, other in enumerate(strata) if other == stratum]
        for time in sorted({times[row] for row in rows if events[row]}):
            at_risk = torch.stack([scores[row].exp() for row in rows if times[row] >= time]).sum()
            tied = [scores[row] for row in rows if times[row] == time and events[row]]
            tied_sum = torch.stack(tied).exp().sum()
            n_events += len(tied)
            for position, score in enumerate(tied):
                left_out = position / len(tied) if ties == "efron" else 0
                terms.append(torch.log(at_risk - left_out * tied_sum) - score)
    return torch.stack(terms).sum() / n_events if terms else None


@pytest.mark.parametrize(("ties", "stratified"), STATSMODELS)
def test_statsmodels_has_the_same_likelihood_and_gradient(ties, stratified):
    log_likelihood, *gradient = STATSMODELS[ties, stratified]
    step = cox_step(table_of(SCORES, TIMES, EVENTS, STRATA if stratified else None), ties)
    assert step.n_events == sum(EVENTS) == 11
    assert -step.loss * step.n_events == pytest.approx(log_likelihood, abs=1e-12)
    torch.testing.assert_close(
        -step.gradient * step.n_events, torch.tensor(gradient, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("stratified", LIFELINES)
def test_lifelines_has_the_same_maximum_and_baseline(stratified):
    coefficient, log_likelihood, hazards = LIFELINES[stratified]
    covariate = torch.tensor(SCORES, dtype=torch.float64)
    strata = STRATA if stratified else None
    step = cox_step(table_of(coefficient * covariate, TIMES, EVENTS, strata))
    assert -step.loss * step.n_events == pytest.approx(log_likelihood, abs=1e-12)
    assert abs(step.gradient @ covariate) < 1e-7  # how near its search comes to the maximum
    baselines = breslow_baseline(table_of(coefficient * (covariate - covariate.mean()), TIMES, EVENTS, strata))
    for stratum, expected in hazards.items():
        baseline = torch.tensor(baselines[stratum].log_hazards, dtype=torch.float64).exp().tolist()
        assert baseline == pytest.approx(expected, abs=1e-10)
        assert baselines[stratum].last_time == 9 if stratum or not stratified else 7


@pytest.mark.parametrize("ties", TIES)
@given(data=st.data(), n=st.integers(2, 25), n_times=st.integers(1, 8), n_strata=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_the_closed_form_is_autograds(ties, data, n, n_times, n_strata):
    times = data.draw(st.lists(st.integers(1, n_times), min_size=n, max_size=n))
    events = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    strata = data.draw(st.lists(st.integers(1, n_strata), min_size=n, max_size=n))
    seed = data.draw(st.integers(0, 99))
    scores = 2 * torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    scores.requires_grad_()
    step = cox_step(table_of(scores, times, events, strata), ties)
    loss = plain_loss(scores, times, events, strata, ties)
    if loss is None:
        assert (step.loss, step.gradient.abs().max()) == (0, 0)
        return
    assert step.loss == pytest.approx(loss.item(), abs=1e-12)
    (expected,) = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(step.gradient, expected, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(cox_surrogate(scores, step.gradient), scores)
    assert torch.equal(gradient, step.gradient)


def test_efron_is_not_breslow_and_strata_are_not_one():
    """Else the comparisons above could not tell them apart."""
    gradients = [
        cox_step(table_of(SCORES, TIMES, EVENTS, strata), ties).gradient for ties in TIES for strata in (None, STRATA)
    ]
    for index, one in enumerate(gradients):
        for other in gradients[index + 1 :]:
            assert (one - other).abs().max() > 0.005
