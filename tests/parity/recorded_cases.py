"""The module of one statement across train-mode BatchNorm, and its comparison with the plain one."""

import copy

import torch
from torch import nn

from ds_wsi.partition import PartitionPolicy, partition_layers

TOLERANCE = 1e-10
TILES, CHUNK, SIDE = 7, 3, 12


class Net(nn.Module):
    """Two norms, and a statement of the test's between them."""

    def __init__(self, statement):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c2, self.n2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c3, self.act = nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(inplace=True)
        self.gain = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.flat = nn.Flatten(1)
        self.statement = statement

    def forward(self, x):
        x = self.n1(self.c1(x))
        x = self.statement(self, x)
        return self.c3(self.n2(self.c2(x))).mean((2, 3))


def made(statement):
    torch.manual_seed(0)
    return Net(statement).double()


def images(count=TILES, seed=1):
    return torch.randn(count, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(module, x, **kwargs):
    x = x.clone().requires_grad_()
    out = module(x, **kwargs)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return out.detach(), x.grad


def assert_same(plain, partitioned, expected, found):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= TOLERANCE * other.abs().max()
    scale = max(parameter.grad.abs().max() for parameter in plain.parameters() if parameter.grad is not None)
    for (name, other), one in zip(plain.named_parameters(), partitioned.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if other.grad is not None:
            assert (one.grad - other.grad).abs().max() <= TOLERANCE * scale, name
    for (name, other), one in zip(plain.named_buffers(), partitioned.buffers(), strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=TOLERANCE, atol=TOLERANCE), name


def assert_exact(module, mode, **kwargs):
    partitioned = copy.deepcopy(module)
    partition_layers(partitioned, PartitionPolicy(mode=mode, chunk_size=CHUNK))
    assert_same(module, partitioned, step(module, images(), **kwargs), step(partitioned, images(), **kwargs))
