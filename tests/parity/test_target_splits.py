"""A step's gradient is one process's, however its bags are split over ranks, stacks and micro-steps: in float64."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from ds_wsi.targets.cox import TIES, cox_step, cox_surrogate
from ds_wsi.targets.denominators import corn_units, labelled_units, target_factor
from ds_wsi.targets.hazards import hazard_loss
from ds_wsi.targets.multilabel import multilabel_loss
from ds_wsi.targets.ordinal import bits_loss, coral_logits, corn_loss, link_loss
from ds_wsi.targets.regression import LOSSES, regression_loss
from ds_wsi.targets.sums import MISSING, connected_zero
from ds_wsi.targets.survival_table import SurvivalTable

B, WIDTH, OUTPUTS, K = 23, 5, 4, 4
WORLDS, STACKS = (1, 2, 4), (1, 2, 3)
layouts = pytest.mark.parametrize(("world", "stacks"), [(world, stacks) for world in WORLDS for stacks in STACKS])


class Bags:
    """Features and all kinds of targets of a step, a third of each kind missing."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(B, WIDTH, dtype=torch.float64, generator=generator)
        missing = torch.rand(4, B, generator=generator) < 1 / 3
        self.values = torch.randn(B, dtype=torch.float64, generator=generator).masked_fill(missing[0], math.nan)
        self.labels = torch.randint(0, K, (B,), generator=generator).masked_fill(missing[1], MISSING)
        self.bins = torch.randint(0, OUTPUTS, (B,), generator=generator).masked_fill(missing[2], MISSING)
        self.events = torch.rand(B, generator=generator) < 0.6
        self.many = (torch.rand(B, OUTPUTS, generator=generator) < 0.4).double()
        self.many[torch.rand(B, OUTPUTS, generator=generator) < 1 / 3] = math.nan
        self.times = torch.randint(1, 7, (B,), generator=generator).double().masked_fill(missing[3], math.nan)
        self.strata = torch.randint(0, 2, (B,), generator=generator)


BAGS = Bags()
IDS = torch.arange(B) * 7 % B  # not in the order of the rows


class Model(nn.Module):
    """Scores of bags, with the parameters that CORAL and the link train beside them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, OUTPUTS)).double()
        self.numbers = nn.Parameter(torch.randn(K - 1, dtype=torch.float64))

    def forward(self, rows):
        return self.layers(BAGS.features[rows])


# Name -> (sum of a stack's losses, units of rows).
SEPARABLE = {
    **{
        kind: (
            lambda model, z, rows, kind=kind: regression_loss(z[:, :1], BAGS.values[rows], kind),
            lambda rows: labelled_units(BAGS.values[rows]),
        )
        for kind in LOSSES
    },
    "bits": (
        lambda model, z, rows: bits_loss(z[:, : K - 1], BAGS.labels[rows]),
        lambda rows: labelled_units(BAGS.labels[rows]),
    ),
    "corn": (
        lambda model, z, rows: corn_loss(z[:, : K - 1], BAGS.labels[rows]),
        lambda rows: corn_units(BAGS.labels[rows], K),
    ),
    "coral": (
        lambda model, z, rows: bits_loss(coral_logits(z[:, 1], model.numbers), BAGS.labels[rows]),
        lambda rows: labelled_units(BAGS.labels[rows]),
    ),
    "link": (
        lambda model, z, rows: link_loss(z[:, 1], model.numbers, BAGS.labels[rows]),
        lambda rows: labelled_units(BAGS.labels[rows]),
    ),
    "multilabel": (
        lambda model, z, rows: multilabel_loss(z, BAGS.many[rows], torch.arange(1.0, OUTPUTS + 1)),
        lambda rows: labelled_units(BAGS.many[rows]),
    ),
    "hazards": (
        lambda model, z, rows: hazard_loss(z, BAGS.bins[rows], BAGS.events[rows], alpha=0.3),
        lambda rows: labelled_units(BAGS.bins[rows]),
    ),
}
ALL = torch.arange(B)


def dealt(world, stacks, seed=0):
    """Rows of each rank's stacks, of uneven sizes, one of them empty where there are several."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(B, generator=generator)
    n = world * stacks
    cuts = (torch.randperm(B - 1, generator=generator)[: n - 1] + 1).sort().values.tolist()
    parts = [order[start:end] for start, end in pairwise([0, *cuts, B])]
    if n > 1:  # the last rank idles in its last stack
        parts[0], parts[-1] = torch.cat([parts[0], parts[-1]]), order[:0]
    return [parts[rank * stacks : (rank + 1) * stacks] for rank in range(world)]


def engine(model, losses):
    """What an engine makes of each rank's micro-steps: the mean over ranks of the mean over micro-steps."""
    total = torch.zeros(sum(parameter.numel() for parameter in model.parameters()), dtype=torch.float64)
    for of_rank in losses:
        for loss in of_rank:
            model.zero_grad()
            (loss / len(of_rank)).backward()
            total += gradient(model) / len(losses)
    return total


def gradient(model):
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def in_stacks(name, world, stacks, *, own_units=False):
    """The gradient of a separable loss; `own_units`: each stack's sum is divided by its own labelled units."""
    model, (loss, units) = Model(), SEPARABLE[name]
    rows_of = dealt(world, stacks)

    def term(rows):
        factor = 1 / max(1, units(rows)) if own_units else target_factor(units(ALL), world, stacks)
        return (loss(model, model(rows), rows) if len(rows) else connected_zero(model(ALL[:1]))) * factor

    return engine(model, [[term(rows) for rows in of_rank] for of_rank in rows_of])


def whole(name):
    model, (loss, units) = Model(), SEPARABLE[name]
    (loss(model, model(ALL), ALL) / units(ALL)).backward()
    return gradient(model)


def survival_table(scores, rows):
    return SurvivalTable.of(scores, BAGS.times[rows], BAGS.events[rows], IDS[rows], BAGS.strata[rows])


def concatenated(tables):
    """What the gather returns on every rank."""
    return SurvivalTable(
        *(torch.cat(parts) for parts in zip(*((t.scores, t.times, t.events, t.strata, t.ids) for t in tables)))
    )


def cox_in_stacks(world, stacks, ties):
    """Two passes: scores without a graph, gathered; then each stack's backward from its own part of the gradient."""
    model, rows_of = Model(), dealt(world, stacks)
    stacked = [torch.cat(of_rank) for of_rank in rows_of]
    with torch.no_grad():
        tables = [
            survival_table(torch.cat([model(rows)[:, 2:3] for rows in of_rank]), stacked[rank])
            for rank, of_rank in enumerate(rows_of)
        ]
    step = cox_step(concatenated(tables), ties)
    parts = iter(step.gradient.split([len(rows) for of_rank in rows_of for rows in of_rank]))
    factor = target_factor(1, world, stacks)

    def term(rows, part):
        return (cox_surrogate(model(rows)[:, 2], part) if len(rows) else connected_zero(model(ALL[:1]))) * factor

    return engine(model, [[term(rows, next(parts)) for rows in of_rank] for of_rank in rows_of]), step.loss


def plain_cox(scores, rows, ties):
    """Cox's loss with a graph, plainly: sums over pairs of bags."""
    theta, total, n_events = scores.reshape(-1), 0.0, 0
    times, events, strata = BAGS.times[rows], BAGS.events[rows] & ~BAGS.times[rows].isnan(), BAGS.strata[rows]
    for row in events.nonzero().reshape(-1).tolist():
        same = strata == strata[row]
        tied = same & events & (times == times[row])
        position = int((tied[:row]).sum())  # which of the tie this one is, is its row's order
        left_out = position / int(tied.sum()) if ties == "efron" else 0
        at_risk = theta[same & (times >= times[row])].exp().sum()
        total = total + torch.log(at_risk - left_out * theta[tied].exp().sum()) - theta[row]
        n_events += 1
    return total / max(1, n_events)


def whole_cox(ties):
    model = Model()
    loss = plain_cox(model(ALL)[:, 2], ALL, ties)
    loss.backward()
    return gradient(model), loss.item()


@layouts
@pytest.mark.parametrize("name", SEPARABLE)
def test_a_split_step_is_one_process(name, world, stacks):
    torch.testing.assert_close(in_stacks(name, world, stacks), whole(name), rtol=0, atol=1e-14)


@layouts
@pytest.mark.parametrize("ties", TIES)
def test_a_split_step_of_cox_is_one_process(ties, world, stacks):
    gradient, loss = cox_in_stacks(world, stacks, ties)
    expected, expected_loss = whole_cox(ties)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)
    assert loss == pytest.approx(expected_loss, abs=1e-14)


def test_several_targets_are_the_weighted_sum_of_theirs():
    """One backward for all of a stack: each target's sum with its own factor, Cox's surrogate among them."""
    world, stacks, weights = 2, 3, {"huber": 0.5, "corn": 2.0, "multilabel": 0.25}
    model, rows_of = Model(), dealt(world, stacks)
    with torch.no_grad():
        step = cox_step(survival_table(model(ALL)[:, 2], ALL))

    def term(rows):
        if not len(rows):
            return connected_zero(model(ALL[:1]))
        z = model(rows)
        total = cox_surrogate(z[:, 2], step.gradient[rows]) * target_factor(1, world, stacks, 3.0)
        for name, weight in weights.items():
            loss, units = SEPARABLE[name]
            total = total + loss(model, z, rows) * target_factor(units(ALL), world, stacks, weight)
        return total

    gradient = engine(model, [[term(rows) for rows in of_rank] for of_rank in rows_of])
    expected = 3 * whole_cox("efron")[0] + sum(weight * whole(name) for name, weight in weights.items())
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", SEPARABLE)
def test_denominators_of_a_micro_batch_would_be_noticed(name):
    expected = whole(name)
    assert (in_stacks(name, 2, 3, own_units=True) - expected).norm() > 0.05 * expected.norm()


def test_the_mean_of_the_stacks_own_cox_losses_would_be_noticed():
    """Also of stacks of equal size: the risk sets are not the step's."""
    model = Model()
    losses = [
        [plain_cox(model(rows)[:, 2], rows, "efron") for rows in ALL.split(6)[rank : rank + 2]] for rank in (0, 2)
    ]
    expected, _ = whole_cox("efron")
    assert (engine(model, losses) - expected).norm() > 0.05 * expected.norm()
