"""Stacked training equals training bag by bag; attention pooling equals its formula."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

from ds_wsi.models import AGGREGATORS, SlideModel, build_aggregator, build_encoder, freeze
from ds_wsi.models.loss import stack_loss
from ds_wsi.stacking import stack_bags
from ds_wsi.training.step import bag_weight, blank_tile, idle_loss

SIZES = (3, 1, 6)


def tiny_model(aggregator: str) -> SlideModel:
    torch.manual_seed(0)
    encoder = timm.create_model("resnet10t", num_classes=0)
    fewer = {"landmarks": 8} if aggregator == "transmil" else {}  # its pseudo-inverses are what takes long
    return SlideModel(encoder, build_aggregator(aggregator, encoder.num_features, 2, dropout=0.0, **fewer)).double()


def bags_and_labels():
    generator = torch.Generator().manual_seed(1)
    bags = [torch.randn(n, 3, 64, 64, dtype=torch.float64, generator=generator) for n in SIZES]
    return bags, torch.tensor([0, 1, 1])


def double_loss(output, labels):
    """`stack_loss` without its rounding to float32."""
    loss = F.cross_entropy(output.logits, labels, reduction="sum")
    return loss if output.auxiliary_loss is None else loss + output.auxiliary_loss.sum()


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_stacked_gradient_is_the_mean_of_per_bag_gradients(aggregator):
    model = tiny_model(aggregator).train()
    single = copy.deepcopy(model)
    bags, labels = bags_and_labels()
    torch.manual_seed(2)  # masks and splits of bags are drawn bag by bag: the same for both
    double_loss(model(stack_bags(bags), labels), labels).mul(bag_weight(len(bags), 1, 1)).backward()
    torch.manual_seed(2)
    for bag, label in zip(bags, labels, strict=True):
        (double_loss(single(stack_bags([bag]), label[None]), label[None]) / len(bags)).backward()
    for (name, of_stack), of_single in zip(model.named_parameters(), single.parameters(), strict=True):
        # The floor is for attention_w.bias, whose gradient is zero: a softmax does not see a constant.
        scale = of_single.grad.abs().max().clamp_min(1e-6)
        assert ((of_stack.grad - of_single.grad).abs().max() / scale) < 1e-10, name
    # BatchNorm saw the same bags in the same order.
    for of_stack, of_single in zip(model.buffers(), single.buffers(), strict=True):
        torch.testing.assert_close(of_stack, of_single, rtol=1e-12, atol=1e-12)


def test_gradients_reach_the_first_convolution():
    model = tiny_model("gated_abmil").train()
    bags, labels = bags_and_labels()
    stack_loss(model(stack_bags(bags)), labels).backward()
    first = next(module for module in model.encoder.modules() if isinstance(module, torch.nn.Conv2d))
    assert first.weight.grad.abs().max() > 0


@pytest.mark.parametrize("gated", [False, True])
def test_abmil_is_its_formula(gated):
    torch.manual_seed(0)
    model = build_aggregator("gated_abmil" if gated else "abmil", 8, 3).double()
    bag = torch.randn(11, 8, dtype=torch.float64)
    hidden = torch.tanh(bag @ model.attention_v.weight.T + model.attention_v.bias)
    if gated:
        hidden = hidden * torch.sigmoid(bag @ model.attention_u.weight.T + model.attention_u.bias)
    weights = torch.softmax(hidden @ model.attention_w.weight.T + model.attention_w.bias, 0)
    logits = (weights * bag).sum(0) @ model.classifier.weight.T + model.classifier.bias
    output = model(stack_bags([torch.randn(4, 8, dtype=torch.float64), bag]))
    torch.testing.assert_close(output.logits[1], logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.attention[4:], weights[:, 0], rtol=1e-12, atol=1e-12)


def test_uint8_tiles_are_normalised_as_torchvision_does():
    from torchvision.transforms.v2.functional import normalize, to_dtype

    model = tiny_model("mean").float()
    tiles = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    expected = normalize(
        to_dtype(tiles, torch.float32, scale=True), model.mean.flatten().tolist(), model.std.flatten().tolist()
    )
    torch.testing.assert_close(model.normalise(tiles), expected, rtol=1e-5, atol=1e-6)


def test_a_frozen_encoder_keeps_weights_and_statistics():
    model = tiny_model("gated_abmil")
    freeze(model.encoder)
    model.train()
    before = copy.deepcopy(model.encoder.state_dict())
    bags, labels = bags_and_labels()
    stack_loss(model(stack_bags(bags)), labels).backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())
    assert model.aggregator.classifier.weight.grad.abs().max() > 0


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_a_rank_without_a_bag_changes_nothing(aggregator):
    model = tiny_model(aggregator).float().train()
    before = copy.deepcopy(model.state_dict())
    idle_loss(model, blank_tile(64, torch.device("cpu"))).backward()
    # Every parameter takes part in the engine's reduction, with a zero.
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_wrong_names_are_refused_with_help():
    with pytest.raises(ValueError, match=r"encoder must be a timm model's name.*HINT.*resnet18"):
        build_encoder("resnet19")
    with pytest.raises(ValueError, match="aggregator must be one of abmil"):
        build_aggregator("abmill", 4, 2)
