"""Losses of real-valued, ordered and multiple targets, by hand and against plain forms, and their units."""

import math

import pytest
import torch
import torch.nn.functional as F

from ds_wsi.targets.denominators import corn_units, labelled_units, target_factor
from ds_wsi.targets.multilabel import balanced_pos_weight, multilabel_loss
from ds_wsi.targets.ordinal import (
    bits_loss,
    chances_above,
    class_chances,
    coral_biases,
    coral_logits,
    corn_chances_above,
    corn_loss,
    decided_class,
    initial_link,
    link_chances_above,
    link_cuts,
    link_loss,
    raw_score,
)
from ds_wsi.targets.regression import LOSSES, regression_loss, standardisation
from ds_wsi.targets.sums import MISSING, connected_zero, masked_sum

NAN = math.nan


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ sums

# Of 5 bags: name -> (outputs' shape, targets, loss of outputs and targets).
LABELS = torch.tensor([0, 3, MISSING, 1, 2])
CASES = {
    **{
        kind: ((5, 1), doubles(0.3, -2, NAN, 1, 0), lambda z, y, w, kind=kind: regression_loss(z, y, kind, w))
        for kind in LOSSES
    },
    "bits": ((5, 3), LABELS, bits_loss),
    "corn": ((5, 3), LABELS, corn_loss),
    "coral": ((5, 1), LABELS, lambda z, y, w: bits_loss(coral_logits(z, coral_biases(4)), y, w)),
    "link": ((5, 1), LABELS, lambda z, y, w: link_loss(z, initial_link(4), y, w)),
    "multilabel": (
        (5, 2),
        torch.tensor([[0, 1], [1, 1], [NAN, NAN], [0, NAN], [1, 0]]),
        lambda z, y, w: multilabel_loss(z, y, None, w),
    ),
}
of_each_loss = pytest.mark.parametrize(("shape", "targets", "loss"), CASES.values(), ids=CASES)


@of_each_loss
def test_a_bag_without_a_target_is_in_no_sum_and_gets_no_gradient(shape, targets, loss):
    outputs = normal(*shape).requires_grad_()
    labelled = torch.tensor([0, 1, 3, 4])
    total = loss(outputs, targets, None)
    torch.testing.assert_close(total, loss(outputs[labelled], targets[labelled], None), rtol=0, atol=1e-14)
    total.backward()
    assert outputs.grad[2].abs().max() == 0
    assert outputs.grad[labelled].abs().amax(1).min() > 0


@of_each_loss
def test_without_a_labelled_bag_the_zero_stays_connected(shape, targets, loss):
    for rows in ([2], []):
        outputs = normal(*shape).requires_grad_()
        total = loss(outputs[rows], targets[rows], None)
        assert (total.item(), total.requires_grad) == (0.0, True)
        total.backward()
        assert outputs.grad.abs().max() == 0


@of_each_loss
def test_a_bags_weight_is_the_factor_of_its_loss(shape, targets, loss):
    outputs, weights = normal(*shape), doubles(2, 0.5, 7, 0, 1)
    each = torch.stack([loss(outputs[row : row + 1], targets[row : row + 1], None) for row in range(5)])
    torch.testing.assert_close(loss(outputs, targets, weights), (each * weights).sum(), rtol=0, atol=1e-13)


@of_each_loss
def test_half_precision_is_computed_in_float32(shape, targets, loss):
    outputs = normal(*shape).bfloat16()
    total = loss(outputs, targets, None)
    assert total.dtype is torch.float32
    exact = loss(outputs.double(), targets, None)
    assert total.item() == pytest.approx(exact.item(), rel=1e-6)


def test_an_idle_ranks_zero_is_zero_whatever_its_output_is():
    outputs = torch.tensor([[NAN, math.inf]], requires_grad=True)
    zero = connected_zero(outputs)
    assert zero.item() == 0
    zero.backward()
    assert outputs.grad.tolist() == [[0.0, 0.0]]


def test_masked_sum_takes_what_is_present():
    losses, present = doubles(1, 2, 4).reshape(3, 1), torch.tensor([[True], [False], [True]])
    assert masked_sum(losses, present).item() == 5
    assert masked_sum(losses, present, doubles(1, 1, 0.5)).item() == 3


def test_units_are_counted_from_the_targets():
    assert labelled_units(LABELS) == 4
    assert labelled_units(doubles(1, NAN, -100)) == 2  # a value may be -100
    assert labelled_units(CASES["multilabel"][1]) == 7
    assert corn_units(LABELS, 4) == 1 + 3 + 2 + 3  # class 0 is asked one question, the last two classes all three
    assert target_factor(8, 2, 3, weight=0.5) == 0.375
    assert target_factor(0, 2, 3) == 0.0
    with pytest.raises(ValueError, match=r"one rank and one micro-step or more, got 3, 0 and 1"):
        target_factor(3, 0, 1)


# ------------------------------------------------------------------------------------------------ regression


def test_regression_losses_by_hand():
    outputs, targets = doubles(0.5, -2.0), doubles(0.0, 1.0)
    sums = {kind: regression_loss(outputs, targets, kind).item() for kind in LOSSES}
    assert sums == {"huber": 0.125 + 2.5, "mse": 0.25 + 9, "mae": 0.5 + 3}


def test_a_column_of_outputs_meets_its_own_targets():
    outputs, targets = normal(4), normal(4, seed=1)
    assert regression_loss(outputs[:, None], targets) == regression_loss(outputs, targets)
    with pytest.raises(ValueError, match=r"targets must be one per bag, \[4\], got \[4, 1\]"):
        regression_loss(outputs, targets[:, None])
    with pytest.raises(ValueError, match=r"outputs must be one per bag, \[B\] or \[B, 1\], got \[4, 2\]"):
        regression_loss(normal(4, 2), targets)
    with pytest.raises(ValueError, match=r"must be one of huber, mse, mae, got 'l1'"):
        regression_loss(outputs, targets, "l1")


@pytest.mark.parametrize("log1p", [False, True])
def test_standardised_values_come_back(log1p):
    values = doubles(0, 3, NAN, 120, 7)
    scale = standardisation(values, log1p=log1p)
    standard = scale.apply(values)
    present = standard[~values.isnan()]
    assert standard[2].isnan()
    assert present.mean().item() == pytest.approx(0, abs=1e-14)
    assert present.std(correction=0).item() == pytest.approx(1, abs=1e-14)
    torch.testing.assert_close(scale.undo(standard), values, rtol=1e-14, atol=1e-13, equal_nan=True)
    mean = values.nanmean() if not log1p else values.log1p().nanmean().expm1()
    assert scale.undo(torch.zeros(1)).item() == pytest.approx(mean.item(), rel=1e-14)


def test_targets_that_say_nothing_are_refused():
    for values in ([0.1] * 3, [4.0], [4.0, NAN]):
        with pytest.raises(ValueError, match=rf"values must differ, got {values[0]:g} alone \(\d values?\)\. HINT"):
            standardisation(values)
    with pytest.raises(ValueError, match=r"must be finite, one at least, got 0 values"):
        standardisation([NAN])
    with pytest.raises(ValueError, match=r"got 2 values, 1 of them infinite"):
        standardisation([1.0, math.inf])
    with pytest.raises(ValueError, match=r"greater than -1 for log1p, got -1\. HINT"):
        standardisation([1.0, -1.0], log1p=True)


# ------------------------------------------------------------------------------------------------ ordinal


def test_bits_by_hand():
    logits, labels = normal(1, 3), torch.tensor([2])
    p = logits[0].sigmoid()
    expected = -(p[0].log() + p[1].log() + (1 - p[2]).log())
    torch.testing.assert_close(bits_loss(logits, labels), expected, rtol=0, atol=1e-14)


def test_corn_is_the_likelihood_of_the_class():
    """Summed over the questions that are asked, -log P(y): the chain of conditional chances."""
    logits = normal(1, 3)
    chances = class_chances(corn_chances_above(logits))[0]
    for label in range(4):
        loss = corn_loss(logits, torch.tensor([label]))
        torch.testing.assert_close(loss, -chances[label].log(), rtol=0, atol=1e-13)


def test_corn_equals_the_published_subsets():
    """Bit k over the bags with y > k - 1 alone, all of it divided by how many those are."""
    logits, labels = normal(7, 3), torch.tensor([0, 1, 1, 2, 3, 3, 0])
    total, count = 0.0, 0
    for k in range(3):
        asked = labels > k - 1
        bits = (labels[asked] > k).double()
        total += F.binary_cross_entropy_with_logits(logits[asked, k], bits, reduction="sum").item()
        count += int(asked.sum())
    assert corn_units(labels, 4) == count
    assert corn_loss(logits, labels).item() / corn_units(labels, 4) == pytest.approx(total / count, abs=1e-14)


def test_coral_starts_descending_and_its_chances_fall():
    biases = coral_biases(5)
    torch.testing.assert_close(biases, torch.tensor([1.0, 0.75, 0.5, 0.25]), rtol=0, atol=1e-7)
    above = chances_above(coral_logits(normal(6, 1), biases))
    assert above.shape == (6, 4)
    assert (above.diff(dim=1) < 0).all()


def test_the_link_is_a_distribution_and_its_loss_the_logarithm():
    scores, raw = normal(5), normal(3, seed=2)
    cuts = link_cuts(raw)
    assert (cuts.diff() > 0).all()
    below = torch.cat([torch.zeros(5, 1), (cuts - scores[:, None]).sigmoid(), torch.ones(5, 1)], dim=1)
    torch.testing.assert_close(1 - link_chances_above(scores, raw), below[:, 1:-1], rtol=0, atol=1e-15)
    for label in range(4):
        loss = link_loss(scores, raw, torch.full((5,), label))
        expected = -(below[:, label + 1] - below[:, label]).log().sum()
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(link_cuts(initial_link(4)), torch.tensor([-1.0, 0.0, 1.0]), rtol=0, atol=1e-6)
    two = link_loss(scores, doubles(0.3), torch.tensor([0, 1, 0, 1, 1]))  # of two classes: a logistic regression
    bits = torch.tensor([[0.0], [1], [0], [1], [1]], dtype=torch.float64)
    expected = F.binary_cross_entropy_with_logits(scores[:, None] - 0.3, bits, reduction="sum")
    torch.testing.assert_close(two, expected, rtol=0, atol=1e-14)


def test_the_link_is_finite_where_sigmoids_are_equal():
    raw = torch.tensor([0.0, -60.0, 1.0], requires_grad=True)  # the second class has next to no room
    scores = torch.tensor([200.0, -200.0, 0.0], requires_grad=True)
    loss = link_loss(scores, raw, torch.tensor([0, 3, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(200 + 200 + 60 + 2 * math.log(2) + math.log(1 + math.e), rel=1e-2)
    torch.testing.assert_close(scores.grad[:2], torch.tensor([1.0, -1.0]))
    assert raw.grad.isfinite().all()
    plain = (link_cuts(raw) - 200).sigmoid()
    assert plain[1] == plain[0], "the plain difference would be 0 here, and its logarithm infinite"


def test_chances_of_classes_and_the_decision():
    above = doubles(0.9, 0.6, 0.1).reshape(1, 3)
    torch.testing.assert_close(class_chances(above), doubles(0.1, 0.3, 0.5, 0.1).reshape(1, 4), rtol=0, atol=1e-15)
    assert (decided_class(above).item(), raw_score(above).item()) == (2, pytest.approx(1.6))
    rising = class_chances(doubles(0.5, 0.8, 0.2).reshape(1, 3))  # bits need not fall
    torch.testing.assert_close(rising, doubles(0.5, 0, 0.6, 0.2).reshape(1, 4) / 1.3, rtol=0, atol=1e-15)


@pytest.mark.parametrize("label", [4, -1])
def test_a_class_that_is_not_there_is_an_error(label):
    labels = torch.tensor([label])
    for loss in (bits_loss, corn_loss):
        with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
            loss(torch.zeros(1, 3), labels)
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        link_loss(torch.zeros(1), initial_link(4), labels)


# ------------------------------------------------------------------------------------------------ multilabel


def test_multilabel_is_torchs_mean_where_nothing_is_missing():
    logits, targets = normal(4, 3), (normal(4, 3, seed=1) > 0).double()
    factors = doubles(1, 3, 0.5)
    expected = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=factors)
    mean = multilabel_loss(logits, targets, factors) / labelled_units(targets)
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match=r"the logits' shape, \[4, 3\], got \[4, 2\]"):
        multilabel_loss(logits, targets[:, :2])


def test_a_missing_label_leaves_the_bags_others():
    logits, targets = normal(2, 2).requires_grad_(), torch.tensor([[1, NAN], [0, 1]])
    multilabel_loss(logits, targets).backward()
    p = logits.detach().sigmoid()
    torch.testing.assert_close(logits.grad, torch.stack([doubles(p[0, 0] - 1, 0), doubles(p[1, 0], p[1, 1] - 1)]))


def test_balanced_factors_are_of_the_training_counts():
    targets = torch.tensor([[1, 0], [0, 1], [0, NAN], [0, 1], [NAN, 1]])
    assert balanced_pos_weight(targets, ["egfr", "kras"]).tolist() == [3.0, 1 / 3]
    with pytest.raises(ValueError, match=r"got one value of kras\. HINT: leave these labels out"):
        balanced_pos_weight(torch.tensor([[1, 1], [0, NAN]]), ["egfr", "kras"])
