"""Shared norms do not read a number from the device: the CPU would wait for all that was queued."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ds_wsi.norms.population import merged, merged_over, moments_of
from ds_wsi.norms.roles import population_group, set_evaluated
from ds_wsi.norms.shared import share_norms
from ds_wsi.partition import PartitionPolicy, plan_partition


class Reads(TorchDispatchMode):
    """Counts what reads a tensor's value."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._overloadpacket is torch.ops.aten._local_scalar_dense
        return func(*args, **kwargs or {})


@pytest.fixture
def reads(monkeypatch):
    """A process group of one rank, and the count; `tolist` counts too, which a CPU answers without an operation."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    counter, tolist = Reads(), torch.Tensor.tolist

    def counted(tensor):
        counter.count += 1
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    yield counter
    dist.destroy_process_group()


def test_a_forward_and_a_backward_of_shared_norms_read_nothing(reads):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).train()
    share_norms(module, dist.group.WORLD)
    with reads:
        module(torch.randn(5, 3, 8, 8)).sum().backward()
    assert reads.count == 0
    with reads:
        torch.ones(1).item()
    assert reads.count == 1


@pytest.mark.parametrize("without", [{"bias": False}, {"affine": False}, {}])
def test_shared_norms_have_the_gradients_of_plain_ones(reads, without):
    """A norm with a weight and no bias too, for which there is no gradient to return."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **without), nn.ReLU()).double().train()
    module, x = copy.deepcopy(plain), torch.randn(5, 3, 8, 8, dtype=torch.float64)
    share_norms(module, dist.group.WORLD)
    dy = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    for one in (plain, module):
        one(x).backward(dy)
    for parameter, plain_parameter in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, plain_parameter.grad)


def test_one_value_a_channel_is_refused_though_nothing_else_reads_the_count(reads):
    module = nn.Sequential(nn.BatchNorm1d(4)).train()
    share_norms(module, dist.group.WORLD)
    with pytest.raises(ValueError, match=r"must see more than one value per channel, got 1\. HINT"):
        module(torch.randn(1, 4))
    with pytest.raises(ValueError, match=r"must see more than one value per channel, got 0\. HINT"):
        module(torch.randn(0, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_on_the_device_merge_as_those_on_the_host(reads, monkeypatch, dtype):
    """Three ranks, of which the first and the last have no element."""
    like = torch.zeros(4, dtype=dtype)
    parts = [None, *(moments_of(torch.randn(n, 4, 3, 3, dtype=dtype) + 3) for n in (7, 2)), None]
    monkeypatch.setattr(dist, "get_world_size", lambda group: len(parts))

    def gather(received, sent, group):
        for target, part in zip(received, parts, strict=True):
            target.zero_()
            if part is not None:
                target.copy_(torch.cat([part.mean, part.m2, torch.tensor([0, part.count], dtype=dtype)]))

    monkeypatch.setattr(dist, "all_gather", gather)
    expected = None
    for part in parts:
        expected = merged(expected, part)
    of_device = merged_over(None, parts[1], like)
    assert float(of_device.count) == expected.count
    assert torch.equal(of_device.mean, expected.mean)
    assert torch.equal(of_device.m2, expected.m2)
    assert torch.equal(of_device.unbiased_var, expected.unbiased_var)


@pytest.mark.parametrize("of_step", [False, True])
def test_norms_that_share_are_planned_without_their_group(reads, of_step):
    """A plan is of a copy, and nobody copies a process group; nor has a step's group a say in evaluation."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)).train()
    undo = share_norms(module, dist.group.WORLD, of_step=of_step)
    plan = plan_partition(module, (5, 3, 8, 8), PartitionPolicy(mode="lean"))
    assert [segment.mode for segment in plan.segments] == ["lean"] * len(plan.segments)
    norm = module[1]
    set_evaluated([norm], True)
    assert (population_group(norm) is None) == of_step
    assert population_group(norm, in_training=True) is dist.group.WORLD
    set_evaluated([norm], False)
    assert population_group(norm) is dist.group.WORLD
    undo()
    assert population_group(norm) is None
    assert type(norm) is nn.BatchNorm2d
