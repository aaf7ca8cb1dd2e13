"""Encoders, one step of them, and the comparison of a partitioned one with the plain one."""

import timm
import torch
from torch import nn

# The same operations in a tenth of the time; whole widths are for the slow tests.
NARROW = {
    "resnet10t": {"channels": (16, 32, 64, 128)},
    "resnet18": {"channels": (16, 32, 64, 128)},
    "convnext_tiny": {"dims": (16, 32, 64, 128)},
}
TOLERANCE = 1e-10  # relative, in float64: sums over chunks round differently from sums over bags


def build(name, **options):
    torch.manual_seed(0)
    encoder = timm.create_model(name, num_classes=0, **{**NARROW.get(name, {}), **options}).double()
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
    return encoder


def tiles(count, side=32, seed=1):
    return torch.randn(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient_of(out):
    return torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))


def step(module, x):
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(gradient_of(out))
    return out.detach(), x.grad


def relative(one, other):
    return ((one - other).abs().max() / other.abs().max().clamp_min(1e-12)).item()


def assert_same(plain, partitioned, expected, found):
    for name, one, other in zip(("output", "input gradient"), found, expected, strict=True):
        assert relative(one, other) <= TOLERANCE, name
    assert_same_state(plain, partitioned)


def assert_same_state(plain, partitioned):
    assert plain.state_dict().keys() == partitioned.state_dict().keys()
    scale = max(parameter.grad.abs().max() for parameter in plain.parameters() if parameter.grad is not None)
    for (name, other), one in zip(plain.named_parameters(), partitioned.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            assert (one.grad - other.grad).abs().max() <= TOLERANCE * scale, name
    for (name, other), one in zip(plain.named_buffers(), partitioned.buffers(), strict=True):
        assert relative(one.double(), other.double()) <= TOLERANCE, name
