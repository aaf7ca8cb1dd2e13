"""A network and its batches, trained plain and partitioned by the same loop of others."""

import copy

import timm
import torch
from torch import nn
from torch.nn import functional as F

from ds_wsi.partition import PartitionPolicy, partition_layers

TOLERANCE = 1e-9  # relative, in float64, after a few steps
TILES, SIDE, CLASSES, STEPS = 7, 32, 3, 3
MODES = ("lean", "recompute")


def partition(part, mode):
    """What a user adds to a loop."""
    return partition_layers(part, PartitionPolicy(mode=mode, chunk_size=3))


def network(classes=CLASSES, name="test_resnet"):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=classes).double().train()


def batches(count=STEPS, tiles=TILES):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(tiles, 3, SIDE, SIDE, dtype=torch.float64, generator=generator)
        yield x, torch.randint(0, CLASSES, (tiles,), generator=generator)


def sgd(model, rate=0.05):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate, momentum=0.9)


def learn(model, optimizer, count=STEPS):
    for x, target in batches(count):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()


def assert_same(one, other):
    """Two modules, or state dicts, with the same numbers."""
    one, other = (item.state_dict() if isinstance(item, nn.Module) else item for item in (one, other))
    assert one.keys() == other.keys()
    for name, value in one.items():
        if value.is_floating_point():
            scale = other[name].abs().max().clamp_min(1e-3)
            assert (value - other[name]).abs().max() <= TOLERANCE * scale, name
        else:
            assert torch.equal(value, other[name]), name


def assert_it_learned(before, after):
    assert max((before[name] - value).abs().max().item() for name, value in after.items()) > 1e-3


def both(model, loop, part=lambda model: model, mode="lean"):
    """The loop on an untouched copy and on a partitioned one; whatever else it returns must be the same too."""
    start = copy.deepcopy(model.state_dict())
    plain, parted = copy.deepcopy(model), copy.deepcopy(model)
    partition(part(parted), mode)
    results = [loop(each) for each in (plain, parted)]
    assert_same(parted, plain)
    assert_it_learned(start, parted.state_dict())
    if results[0] is not None:
        assert_same(results[1], results[0])
    return plain, parted
