"""The module, the tiles and the calls of the tests of the check at the first call."""

import pytest
import torch
from torch import nn

from ds_wsi.partition import PartitionPolicy, partition_layers

SIX = ("lean", "recompute", "keep", "checkpoint", "offload", "stream")


def group_norm(channels):
    return nn.GroupNorm(1, channels)


BATCH, GROUP = pytest.param(nn.BatchNorm2d, id="batchnorm"), pytest.param(group_norm, id="groupnorm")
both = pytest.mark.parametrize("norm", [BATCH, GROUP])
modes = pytest.mark.parametrize("mode", ["lean", "recompute", "keep"])


class Net(nn.Module):
    """A residual block with something in it."""

    def __init__(self, norm=nn.BatchNorm2d, middle=None, first=None):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 8, 3, padding=1), first or norm(8)
        self.middle = middle or nn.Identity()
        self.c2, self.n2 = nn.Conv2d(8, 8, 3, padding=1), norm(8)
        self.act = nn.ReLU(inplace=True)
        self.c3 = nn.Conv2d(8, 6, 3, stride=2)

    def forward(self, x):
        x = self.middle(self.act(self.n1(self.c1(x))))
        y = self.act(self.n2(self.c2(x)) + x)
        return self.c3(y).mean((2, 3))


def tiles(count=7, side=12, dtype=torch.float64):
    numbers = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, side, side, dtype=torch.float64, generator=numbers).to(dtype)


def call(module, x=None, mode="lean", **policy):
    """One step of the partitioned module."""
    torch.manual_seed(0)
    if not getattr(module.forward, "encodes_stacks", False):
        partition_layers(module, PartitionPolicy(mode=mode, chunk_size=3, **policy))
    out = module(tiles() if x is None else x)
    if out.requires_grad:
        out.square().sum().backward()
    return out.detach()


def refusal(module, mode="lean"):
    """Why the module is refused; "" where it is not."""
    try:
        call(module, mode=mode)
    except ValueError as error:
        return str(error)
    return ""


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        f = x.flatten(1)
        return x + (torch.softmax(self.q(x).flatten(1) @ f.T / f.shape[1], dim=1) @ f).view_as(x)


class Neighbours(nn.Module):
    def forward(self, x):
        return x + 0.1 * x.roll(1, 0)


class TokensOfAllTiles(nn.Module):
    """Batch-first data for a layer that was made for batch-second."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return x + self.attention(tokens, tokens, tokens)[0].transpose(1, 2).reshape_as(x)


class Remembers(nn.Module):
    """Sets at its first call what stays: a cache of a size."""

    def __init__(self):
        super().__init__()
        self.size = None

    def forward(self, x):
        if self.size is None:
            self.size = 12
        return x
