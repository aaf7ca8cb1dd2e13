"""Draws in modules across train-mode BatchNorm: the same in every pass, or refused."""

import copy
import random

import numpy as np
import pytest
import timm
import torch
from recorded_cases import CHUNK, TILES, TOLERANCE, assert_same, images, made, step
from torch import nn

from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.partition.policy import MODES


def drop_path(net, x):
    keep = 0.5
    mask = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep)
    mask.div_(keep)
    return x * mask


@pytest.mark.parametrize("mode", MODES)
def test_stochastic_depth_scales_its_mask(mode):
    module = made(lambda net, x: drop_path(net, torch.ones_like(x)))
    values = set()
    handle = partition_layers(module, PartitionPolicy(mode=mode, chunk_size=CHUNK))
    module.n2 = module.c2 = nn.Identity()
    module.c3 = nn.Conv2d(8, 1, 1, bias=False).double()
    nn.init.constant_(module.c3.weight, 1 / 8)
    torch.manual_seed(0)
    for _ in range(10):
        values |= set(module(images()).detach().flatten().round(decimals=9).tolist())
    assert values == {0.0, 2.0}
    handle.remove()


def test_moments_with_timm_s_drop_path_are_the_plain_module_s():
    def features(partitioned, rate, draws=24):
        torch.manual_seed(0)
        net = timm.create_model("resnet10t", num_classes=0, drop_path_rate=rate).double().train()
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.weight, 0.5, 1.5)
        if partitioned:
            partition_layers(net, PartitionPolicy(mode="lean", chunk_size=4))
        x = torch.randn(8, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(2)
        with torch.no_grad():
            return torch.stack([net(x) for _ in range(draws)])

    plain, parted, without = features(False, 0.5), features(True, 0.5), features(False, 0.0, 1)
    spread = [value.std(0).mean().item() for value in (plain, parted)]
    assert spread[1] == pytest.approx(spread[0], rel=0.15)
    assert plain.std().item() == pytest.approx(parted.std().item(), rel=0.05)
    assert abs(without.std().item() - plain.std().item()) > 0.1, "the test must see a mask that is not scaled"


@pytest.mark.parametrize("mode", ["keep", "lean", "checkpoint", "offload", "stream"])
@pytest.mark.parametrize("draws", [0, 1], ids=["kept", "dropped"])
def test_in_one_chunk_timm_s_drop_path_draws_as_the_plain_module(mode, draws):
    torch.manual_seed(0)
    plain = timm.create_model("resnet10t", num_classes=0, drop_path_rate=0.5).double().train()
    for part in plain.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
    module = copy.deepcopy(plain)
    partition_layers(module, PartitionPolicy(mode=mode, chunk_size=TILES))
    x = torch.randn(TILES, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for net in (plain, module):
        torch.manual_seed(draws)
        results.append(step(net, x))
    assert_same(plain, module, *results)


@pytest.mark.parametrize("mode", MODES)
def test_a_number_drawn_once_a_call_is_drawn_once(mode):
    module = made(lambda net, x: x + torch.rand((), dtype=torch.float64))
    module.n2 = module.c2 = nn.Identity()
    partition_layers(module, PartitionPolicy(mode=mode, chunk_size=CHUNK))
    same = images()[:1].expand(TILES, -1, -1, -1)
    torch.manual_seed(1)
    first = module(same)
    assert torch.allclose(first, first[:1].expand_as(first), rtol=TOLERANCE), "all tiles of all chunks have the same"
    assert not torch.allclose(module(same), first), "the next call draws another"


def test_a_part_that_is_called_beside_the_partition_is_told_once(caplog):
    encoder = timm.create_model("resnet10t", num_classes=0)
    handle = partition_layers(encoder, PartitionPolicy(mode="lean", chunk_size=2))
    x = torch.randn(3, 3, 32, 32)
    with caplog.at_level("WARNING", logger="ds_wsi"):
        encoder(x).sum().backward()
        assert not caplog.messages
        encoder.forward_features(x)
        encoder.forward_features(x)
    (told,) = caplog.messages
    assert "a part of a partitioned ResNet (Sequential) was called beside the partition" in told
    handle.remove()
    assert not any(part._forward_pre_hooks for part in encoder.modules())


GENERATOR = torch.Generator()


@pytest.mark.parametrize(
    "statement",
    [
        lambda net, x: x * (0.5 + random.random()),
        lambda net, x: x * float(np.random.rand()),
        lambda net, x: x * torch.rand((), generator=GENERATOR, dtype=torch.float64),
        lambda net, x: x * torch.empty_like(x).uniform_(0.5, 1, generator=GENERATOR),
    ],
    ids=["random", "numpy", "generator", "in place"],
)
def test_draws_that_cannot_be_replayed_are_refused(statement):
    module = made(statement)
    partition_layers(module, PartitionPolicy(mode="lean", chunk_size=CHUNK))
    states = random.getstate(), GENERATOR.get_state()
    with pytest.raises(ValueError, match="must draw from torch's default generators"):
        module(images())
    assert random.getstate() == states[0]
    assert torch.equal(GENERATOR.get_state(), states[1])
