"""The module, the step and the comparisons of the tests of modules with any Python in their forward."""

import pytest
import torch
from torch import nn

from ds_wsi.partition import PartitionPolicy, partition_layers

TILES, CHUNK = 7, 3
NORMS = {"bn": nn.BatchNorm2d, "gn": lambda channels: nn.GroupNorm(1, channels)}
every_norm = pytest.mark.parametrize("norm", NORMS)
kinds_of_modes = pytest.mark.parametrize(("norm", "mode"), [("bn", "recompute"), ("bn", "lean"), ("gn", "keep")])
MODES = ("keep", "lean", "recompute")


class Middle(nn.Module):
    """A statement of the test's, and what it needs."""

    def __init__(self, run, **held):
        super().__init__()
        self.run = run
        for key, value in held.items():
            setattr(self, key, value)

    def forward(self, x):
        return self.run(self, x)


class Net(nn.Module):
    """A module between convolutions and norms."""

    def __init__(self, norm, middle):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 8, 3, padding=1), NORMS[norm](8)
        self.middle = middle
        self.c2, self.n2 = nn.Conv2d(8, 8, 3, padding=1), NORMS[norm](8)
        self.c3 = nn.Conv2d(8, 6, 3, stride=2)

    def forward(self, x):
        x = self.middle(self.n1(self.c1(x)))
        return self.c3((self.n2(self.c2(x)) + x).relu()).mean((2, 3))


def build(norm, middle):
    torch.manual_seed(0)
    return Net(norm, middle()).double()


def tiles(count=TILES, side=8, seed=1):
    return torch.randn(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(net, x):
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    out = net(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return out.detach(), x.grad


def parted(net, mode, chunk=CHUNK, **policy):
    partition_layers(net, PartitionPolicy(mode=mode, chunk_size=chunk, **policy))
    return net


def assert_same(plain, net, x=None, tolerance=1e-9):
    x = tiles() if x is None else x
    for one, other in zip(step(net, x), step(plain, x), strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()
    grads = {name: parameter.grad for name, parameter in plain.named_parameters()}
    scale = max(grad.to_dense().abs().max() for grad in grads.values() if grad is not None)
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == (grads[name] is None), name
        if grads[name] is not None:
            assert (parameter.grad.to_dense() - grads[name].to_dense()).abs().max() <= tolerance * scale, name
    for (name, one), other in zip(net.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=tolerance, atol=tolerance), name


def assert_exact(norm, mode, middle, chunk=CHUNK, calls=1, change=None):
    plain, net = build(norm, middle), parted(build(norm, middle), mode, chunk)
    for number in range(calls):
        for one in (plain, net):
            if change is not None and number:
                change(one.middle, number)
            one.zero_grad()
        assert_same(plain, net)


def refusal(norm, mode, middle, x=None, chunk=CHUNK):
    net = parted(build(norm, middle), mode, chunk)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        step(net, tiles() if x is None else x)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name  # a refused module is as it was
    return str(caught.value)
