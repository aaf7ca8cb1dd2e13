"""Norms with forwards of their own, in space and over tiles: looked into, or known by name."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers.norm_act import GroupNorm1Act, GroupNormAct
from torch import nn

from ds_wsi.partition import PartitionPolicy, partition_layers

MODES = ("lean", "recompute", "keep")
LARGE = 140  # rows: the check sees 96


class ByHeight(nn.LayerNorm):
    """A norm of its weights alone, twice as much in a high image."""

    def forward(self, x):
        return x * self.weight[:, None, None] * (2 if x.shape[2] > 100 else 1)


class Flipped(nn.LayerNorm):
    def forward(self, x):
        return x.flip(2) * self.weight[:, None, None]


class Kept(nn.LayerNorm):
    """Stays whole: its Function is given the module."""

    class Turned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, part):
            return x.flip(2)

        @staticmethod
        def backward(ctx, grad):
            return grad.flip(2), None

    def forward(self, x):
        return self.Turned.apply(x, self) * self.weight[:, None, None]


class Summed(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + x.cumsum(2)


class Outlying(nn.GroupNorm):
    """A GroupNorm until a value is large."""

    def forward(self, x):
        return super().forward(x.clamp(-9, 9))


class Turned(nn.MaxPool2d):
    """Stays whole too, and is no pooling."""

    def forward(self, x):
        return Kept.Turned.apply(x, self)


class Channels(nn.LayerNorm):
    """A LayerNorm over channels, as many write it."""

    def forward(self, x):
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias).permute(0, 3, 1, 2)


class ByHand(nn.LayerNorm):
    """The same, from its moments."""

    def forward(self, x):
        var, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        other = x.sum(-3, keepdim=True) / x.shape[1]
        x = (x - (mean + other) / 2) / (var + self.eps).sqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class OverRows(ByHand):
    """A moment of whole columns."""

    def forward(self, x):
        return super().forward(x) * x.mean(2, keepdim=True)


NORMS = {
    "a LayerNorm by hand": lambda: ByHand(4),
    "a LayerNorm that looks at rows": lambda: OverRows(4),
    "a LayerNorm that decides by height": lambda: ByHeight(4),
    "a LayerNorm that flips": lambda: Flipped(4),
    "a LayerNorm that stays whole": lambda: Kept(4),
    "a LayerNorm over channels": lambda: Channels(4),
    "an evaluated BatchNorm": lambda: Summed(4).eval(),
    "a GroupNorm that clamps": lambda: Outlying(2, 4),
    "a pooling that stays whole": lambda: Turned(2),
    "timm's GroupNormAct": lambda: GroupNormAct(4, 2),
    "timm's GroupNorm1Act": lambda: GroupNorm1Act(4, act_layer=nn.Tanh),
}


def pair(norm, mode, axis="spatial"):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), norm(), nn.Conv2d(4, 2, 3, padding=1)).double()
    net = copy.deepcopy(plain)
    partition_layers(net, PartitionPolicy(mode=mode, axis=axis, chunk_size=30 if axis == "spatial" else 3))
    return plain, net


def step(net, x):
    net.zero_grad()
    x = x.clone().requires_grad_()
    out = net(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach(), x.grad, *(parameter.grad for parameter in net.parameters())]


def assert_exact(plain, net, x):
    for one, other in zip(step(net, x), step(plain, x), strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one - other).abs().max() <= 1e-9 * other.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize("name", NORMS)
def test_in_space(name):
    for mode in MODES:
        plain, net = pair(NORMS[name], mode)
        x = torch.randn(1, 3, LARGE, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x[0, 0, -1, 2] *= 80.0
        assert_exact(plain, net, x)


@pytest.mark.parametrize("name", NORMS)
def test_over_tiles_across_batchnorm(name):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), NORMS[name]()).double()
    net = copy.deepcopy(plain)
    partition_layers(net, PartitionPolicy(mode="lean", chunk_size=3))
    assert_exact(plain, net, torch.randn(7, 3, 12, 6, dtype=torch.float64))


@pytest.mark.parametrize("name", ["timm's GroupNormAct", "a LayerNorm by hand"])
def test_norms_that_are_computed_in_rows(name):
    _, net = pair(NORMS[name], "lean")
    net(torch.randn(1, 3, LARGE, 6, dtype=torch.float64))
    (program,) = net.forward._programs.values()
    assert all(segment.in_rows for segment in program.segments)


def test_a_norm_without_running_statistics_counts_its_batches():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    plain[1].running_mean = plain[1].running_var = None
    net = copy.deepcopy(plain)
    partition_layers(net, PartitionPolicy(mode="lean", chunk_size=3))
    assert_exact(plain, net, torch.randn(7, 3, 6, 6, dtype=torch.float64))
    assert net[1].num_batches_tracked == plain[1].num_batches_tracked == 1


class Centred(nn.Module):
    """Stays whole: it hangs a hook on what it gives."""

    def forward(self, x):
        x = x - x.mean(2, keepdim=True)
        if x.requires_grad:
            x.register_hook(lambda grad: grad)
        return x


def test_a_refusal_in_space_names_the_part(monkeypatch):
    _, net = pair(Centred, "lean")
    # No module is known that is taken for one that works on rows, and is none: one is made.
    monkeypatch.setattr("ds_wsi.partition.graph.halo._POINTWISE_MODULES", (nn.ReLU, Centred))
    monkeypatch.setattr("ds_wsi.partition.graph.halo.has_library_forward", lambda part: True)
    with pytest.raises(ValueError, match=r"got an output of '2' \(Centred\) that differs by"):
        net(torch.randn(1, 3, 40, 6, dtype=torch.float64))
