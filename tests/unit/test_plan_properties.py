"""Properties that every plan must have, on modules and budgets drawn at random."""

import json
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_wsi.partition import PartitionPlan, PartitionPolicy, partition_layers, plan_partition
from ds_wsi.runtime.memory import ByteMeter

TILES, SIDE = 48, 16
SHAPE = (TILES, 3, SIDE, SIDE)
HOST = 2**30


def network(widths: tuple[int, ...], norm: bool) -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for before, after in zip((3, *widths), widths, strict=False):
        parts.append(nn.Conv2d(before, after, 3, padding=1, bias=not norm))
        parts += [nn.BatchNorm2d(after)] if norm else []
        parts.append(nn.ReLU())
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()


@cache
def planned(widths: tuple[int, ...], norm: bool, budget: int | None) -> PartitionPlan | None:
    try:
        return plan_partition(
            network(widths, norm), SHAPE, PartitionPolicy(gpu_budget_bytes=budget, host_budget_bytes=HOST)
        )
    except ValueError:
        return None


def measured(module: nn.Module, plan: PartitionPlan) -> int:
    """Bytes on the device of a training step, the input and the parameters apart."""
    handle = partition_layers(module, plan)
    x = torch.randn(SHAPE)
    with ByteMeter() as meter:
        module(x).sum().backward()
    handle.remove()
    return meter.peak


networks = st.tuples(st.lists(st.sampled_from([4, 8, 16]), min_size=1, max_size=4).map(tuple), st.booleans())


@settings(max_examples=12, deadline=None, derandomize=True)
@given(networks, st.floats(0.05, 1.2))
def test_neither_the_predicted_nor_the_measured_peak_exceeds_the_budget(shape, share):
    widths, norm = shape
    native = planned(widths, norm, None)
    assert native is not None
    budget = int(share * native.native_peak_bytes)
    plan = planned(widths, norm, budget)
    if plan is None:
        return
    assert plan.peak_bytes <= budget
    assert measured(network(widths, norm), plan) <= budget


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_a_plan_that_went_through_json_runs_the_same(share):
    native = planned((8, 16), True, None)
    assert native is not None
    plan = planned((8, 16), True, int(share * native.native_peak_bytes))
    assert plan is not None
    read = PartitionPlan.from_section(json.loads(json.dumps(plan.to_section())))
    gradients = []
    for one in (plan, read):
        module = network((8, 16), True)
        partition_layers(module, one)
        torch.manual_seed(1)
        module(torch.randn(SHAPE)).square().sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))
