"""The module, the step and the comparisons of the tests of other code around a partitioned module."""

import copy
import os

import pytest
import torch
from torch import nn

from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.partition.policy import MODES

TOLERANCE = 1e-10
NORMS = {"bn": nn.BatchNorm2d, "gn": lambda channels: nn.GroupNorm(1, channels)}
KEEPS_GRAPHS = ("keep", "offload")
every_mode = pytest.mark.parametrize("mode", MODES)
every_norm = pytest.mark.parametrize("norm", NORMS)
# Without BatchNorm a module is one operation, which is held as a graph or run again: a mode of each kind is enough.
EVERYTHING = os.environ.get("DS_WSI_ALL_LAYOUTS") == "1"
MODES_AND_NORMS = [
    (mode, norm) for norm in NORMS for mode in MODES if EVERYTHING or norm == "bn" or mode in ("keep", "lean")
]
every_mode_and_norm = pytest.mark.parametrize(("mode", "norm"), MODES_AND_NORMS)


class Net(nn.Module):
    """Two residual convolutions, and a last one whose result backward does not need."""

    def __init__(self, norm="bn"):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 8, 3, padding=1), NORMS[norm](8)
        self.c2, self.n2 = nn.Conv2d(8, 8, 3, padding=1), NORMS[norm](8)
        self.act, self.c3 = nn.ReLU(inplace=True), nn.Conv2d(8, 6, 3, stride=2)

    def forward(self, x):
        x = self.act(self.n1(self.c1(x)))
        return self.c3(self.act(self.n2(self.c2(x)) + x)).mean((2, 3))


def build(norm="bn", kind=Net):
    torch.manual_seed(0)
    net = kind(norm).double()
    for part in net.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
    return net


def tiles(count=7, side=12, seed=1):
    return torch.randn(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(norm, mode, change=lambda net: None, *, kind=Net, axis="batch"):
    """The plain module and the partitioned one, each changed in the same way before."""
    plain = build(norm, kind)
    parted = copy.deepcopy(plain)
    for net in (plain, parted):
        change(net)
    handle = partition_layers(parted, PartitionPolicy(mode=mode, chunk_size=3, axis=axis))
    return plain, parted, handle


def gradient_of(out):
    return torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))


def step(module, x, call=None):
    x = x.clone().requires_grad_()
    out = module(x) if call is None else call(module, x)
    out.backward(gradient_of(out))
    return out.detach(), x.grad


def differs(one, other):
    return ((one - other).abs().max() / other.abs().max().clamp_min(1e-12)).item()


def assert_same(plain, parted, x=None, call=None):
    """A step of each: outputs, the input's gradient, the parameters' and the buffers."""
    x = tiles() if x is None else x
    for name, one, other in zip(("output", "input"), step(parted, x, call), step(plain, x, call), strict=True):
        assert differs(one, other) <= TOLERANCE, name
    assert_same_state(plain, parted)


def assert_same_state(plain, parted):
    for (name, other), (_, one) in zip(plain.named_parameters(), parted.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            # A bias before a norm has a gradient of zero, which rounds.
            scale = other.grad.abs().max().clamp_min(1e-3)
            assert (one.grad - other.grad).abs().max() <= TOLERANCE * scale, name
    for (name, other), (_, one) in zip(plain.named_buffers(), parted.named_buffers(), strict=True):
        assert differs(one.double(), other.double()) <= TOLERANCE, name
