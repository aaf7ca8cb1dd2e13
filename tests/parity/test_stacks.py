"""Stacks computed in packs, padded, or elsewhere: the same numbers; what a bag draws is its own."""

import copy

import pytest
import torch

from ds_wsi.models import SlideOutput, build_aggregator
from ds_wsi.models.aggregators import AGGREGATORS
from ds_wsi.models.loss import stack_loss
from ds_wsi.stacking import stack_bags
from ds_wsi.stacking.frameworks import pad_bags, sample_bag
from ds_wsi.stacking.packs import pack_bags
from ds_wsi.stacking.randomness import bag_randomness, key_dropouts

LENGTHS = (3, 17, 1, 8, 30, 2)
LABELS = torch.tensor([0, 1, 1, 0, 1, 0])
KEYS = [101, 202, 303, 404, 505, 606]
WIDTH = 12


SMALL = {"transmil": {"embed_dim": 32, "heads": 2, "landmarks": 8}, "rrtmil": {"embed_dim": 32, "heads": 2}}
EMBEDDED = {"embedded abmil": {"embed": "16-8"}}  # with layers before the attention, whose dropout draws


def make(name, dropout=0.0):
    torch.manual_seed(0)
    options = {**EMBEDDED[name], "embed_dropout": dropout} if name in EMBEDDED else SMALL.get(name, {})
    return build_aggregator(name.split()[-1], WIDTH, 2, dropout=dropout, **options).double().train()


def make_bags():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, WIDTH, dtype=torch.float64, generator=generator) for n in LENGTHS]


def step(aggregator, bags, labels):
    needs = getattr(aggregator, "needs_labels", False)
    output = aggregator(stack_bags(bags), labels) if needs else aggregator(stack_bags(bags))
    stack_loss(output, labels).backward()
    return output


def gradients(module):
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["gated_abmil", "clam_sb", "transmil"])
def test_a_bags_weight_is_the_factor_of_its_gradient(name):
    module, weights = make(name), torch.tensor([0.5, 3.0, 1.0, 0.0, 2.0, 1.5], dtype=torch.float64)
    expected = 0
    for bag, label, weight in zip(make_bags(), LABELS, weights, strict=True):
        module.zero_grad()
        step(module, [bag], label[None])
        expected = expected + weight * gradients(module)
    module.zero_grad()
    stack = stack_bags(make_bags())
    output = module(stack, LABELS) if getattr(module, "needs_labels", False) else module(stack)
    stack_loss(output, LABELS, weights).backward()
    torch.testing.assert_close(gradients(module), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", [*AGGREGATORS, *EMBEDDED])
def test_packs_are_the_stack(name):
    whole, packed = make(name), make(name)
    key_dropouts(whole)
    key_dropouts(packed)
    pack_bags(whole, 0)
    handle = pack_bags(packed, 20 * WIDTH * 8)  # twenty instances
    with bag_randomness(KEYS):
        expected, output = step(whole, make_bags(), LABELS), step(packed, make_bags(), LABELS)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-12, atol=1e-13)
    if expected.attention is not None:
        torch.testing.assert_close(output.attention, expected.attention, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradients(packed), gradients(whole), rtol=1e-11, atol=1e-12)
    handle.remove()
    assert "forward" not in packed.__dict__


@pytest.mark.parametrize("name", [*AGGREGATORS, *EMBEDDED])
def test_what_a_bag_draws_is_the_same_wherever_and_with_whom_it_is_computed(name):
    """Dropout, DTFD's splits, ACMIL's masks: a stack of six against stacks of two and four in another order."""
    together, apart = make(name, dropout=0.4), make(name, dropout=0.4)
    for module in (together, apart):
        key_dropouts(module)
        pack_bags(module, 0)
    bags = make_bags()
    with bag_randomness(KEYS):
        expected = step(together, bags, LABELS)
    logits = torch.empty_like(expected.logits)
    for chosen in ([4, 1], [3, 0, 5, 2]):
        torch.manual_seed(len(chosen))  # the generators are elsewhere
        with bag_randomness([KEYS[bag] for bag in chosen]):
            logits[chosen] = step(apart, [bags[bag] for bag in chosen], LABELS[chosen]).logits.detach()
    torch.testing.assert_close(logits, expected.logits.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradients(apart), gradients(together), rtol=1e-10, atol=1e-11)
    with bag_randomness([key + 1 for key in KEYS]):
        other = step(copy.deepcopy(together), bags, LABELS)
    assert not torch.allclose(other.logits, expected.logits)  # another step draws other numbers


@pytest.mark.parametrize("name", ["abmil", "gated_abmil", "mean", "max", "clam_sb", "clam_mb", *EMBEDDED])
def test_padding_with_a_mask_changes_no_number(name):
    plain, padded = make(name), make(name)
    expected = plain(stack_bags(make_bags()))
    handle = pad_bags(padded, SlideOutput)
    output = padded(stack_bags(make_bags()))
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-11, atol=1e-12)
    if expected.attention is not None:
        torch.testing.assert_close(output.attention, expected.attention, rtol=1e-11, atol=1e-12)
    handle.remove()


def test_padding_without_a_mask_does_and_sampling_keeps_a_length():
    torch.manual_seed(0)
    name = "transmil"
    plain, padded = make(name), make(name)
    pad_bags(padded, SlideOutput)
    difference = (padded(stack_bags(make_bags())).logits - plain(stack_bags(make_bags())).logits).abs()
    assert difference[:4].max() > 1e-4  # of the shorter bags
    bag = torch.arange(10.0).unsqueeze(1)
    assert sample_bag(bag, 4, 7).shape == (4, 1)
    assert len(sample_bag(bag, 10, 7).unique()) == 10
    assert sample_bag(bag, 25, 7).shape == (25, 1)
    assert torch.equal(sample_bag(bag, 4, 7), sample_bag(bag, 4, 7))
