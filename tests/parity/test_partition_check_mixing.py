"""The check refuses by name what computes one tile with others, and norms whose own forward does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from check_cases import Attention, Neighbours, Net, TokensOfAllTiles, both, call, modes, refusal, tiles
from timm.layers import EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2, SplitBatchNorm2d
from torch import nn

from ds_wsi.partition import PartitionPolicy, partition_layers


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class FunctionalBatchNorm(nn.Module):
    def forward(self, x):
        return F.batch_norm(x, None, None, training=True)


class Standardised(nn.Module):
    def forward(self, x):
        return (x - x.mean(0, keepdim=True)) / x.std()


class MinusTheFirst(nn.Module):
    def forward(self, x):
        return x - 0.5 * x[:1]


class RunningSum(nn.Module):
    def forward(self, x):
        return x.cumsum(0)


class ByTheLargest(nn.Module):
    """Scaled by the batch's largest value, as some quantisers do."""

    def forward(self, x):
        return x / x.abs().max()


MIXERS = [Attention, FunctionalBatchNorm, Standardised, MinusTheFirst, Neighbours, RunningSum, ByTheLargest]


@modes
@both
@pytest.mark.parametrize("kind", [*MIXERS, TokensOfAllTiles])
def test_a_layer_that_mixes_tiles_is_named(kind, norm, mode):
    name = "middle.attention' .MultiheadAttention" if kind is TokensOfAllTiles else f"middle' .{kind.__name__}"
    with pytest.raises(ValueError, match=f"'{name}. must treat tiles independently, got an output that changes by"):
        call(Net(norm, kind()).double(), mode=mode)


@both
def test_a_mixing_layer_is_named_beside_dropout(norm):
    net = Net(norm, nn.Sequential(nn.Dropout(0.3), Neighbours(), nn.Dropout(0.2))).double()
    with pytest.raises(ValueError, match=r"'middle.1' \(Neighbours\) must treat tiles independently"):
        call(net)


@both
def test_mixing_is_seen_in_evaluation_too(norm):
    net = Net(norm, Attention()).double().eval()
    partition_layers(net, PartitionPolicy(mode="lean", chunk_size=3))
    with torch.no_grad(), pytest.raises(ValueError, match=r"'middle' \(Attention\) must treat tiles independently"):
        net(tiles())


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2])
def test_evonorm_with_batch_statistics_is_named(kind, dtype, norm):
    torch.manual_seed(0)
    net = Net(norm, first=kind(8)).to(dtype)
    # With a train-mode BatchNorm in the module its forward is recorded, and the buffer is seen first.
    why = "treat tiles independently|not write its buffer 'running_var'"
    with pytest.raises(ValueError, match=rf"'n1' \({kind.__name__}\) must ({why})"):
        call(net, tiles(dtype=dtype))


# ------------------------------------------------------------------------------------- refused: a norm's own forward


class Ghost(nn.BatchNorm2d):
    def forward(self, x):
        return torch.cat([super(Ghost, self).forward(part) for part in x.chunk(3)])


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2 + self.bias[:, None, None]


class OfTwice(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x * 2)


class Positive(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight.abs() + 0.1, self.bias, True, 0.1, self.eps
        )


class Clipped(nn.BatchNorm2d):
    """Batch renormalisation's clip of the result."""

    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


@modes
@pytest.mark.parametrize("kind", [Ghost, Doubled, OfTwice, Positive, Clipped])
def test_a_batchnorm_with_a_forward_of_its_own_is_named_or_exact(kind, mode):
    plain = Net(first=kind(8)).double()
    nn.init.uniform_(plain.n1.weight, -1, 1)
    parted = copy.deepcopy(plain)
    said = refusal(parted, mode)
    if said:
        assert f"must have torch's or timm's own forward, got {kind.__name__}'s (layer 'n1')" in said
    else:
        assert torch.allclose(parted.eval()(tiles()), step_and_evaluate(plain), rtol=1e-9)


def step_and_evaluate(plain):
    """What the running statistics of one training step make of the tiles."""
    plain(tiles())
    return plain.eval()(tiles())


def test_split_batchnorm_is_refused_although_it_takes_even_numbers_only():
    net = Net(first=SplitBatchNorm2d(8, num_splits=2)).double()
    with pytest.raises(ValueError, match=r"own forward, got SplitBatchNorm2d's \(layer 'n1'\)"):
        call(net, tiles(8))
