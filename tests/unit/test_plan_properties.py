"""Properties that every plan must have, on modules and budgets drawn at random."""

import json
from functools import cache

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_wsi.partition import PartitionPlan, PartitionPolicy, partition_layers
from ds_wsi.partition.execution.input_tensor import InputCost
from ds_wsi.partition.graph.segments import SegmentSpec
from ds_wsi.partition.planning.costs import SegmentMode
from ds_wsi.partition.planning.rates import ASSUMED
from ds_wsi.partition.planning.search import Planner
from ds_wsi.partition.planning.simulate import Simulator
from ds_wsi.partition.policy import MODES
from ds_wsi.runtime.memory import ByteMeter

TILES, SIDE = 32, 16
SHAPE = (TILES, 3, SIDE, SIDE)
HOST = 2**30
CPU = torch.device("cpu")


def network(widths: tuple[int, ...]) -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for before, after in zip((3, *widths), widths, strict=False):
        parts += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()


@cache
def planner(widths: tuple[int, ...], device: str) -> Planner:
    """One a network: what it simulates for one budget it knows for the others."""
    return Planner(
        *(network(widths), SHAPE, PartitionPolicy(), torch.float32, None, torch.device(device), ASSUMED[device], None)
    )


def planned(case: tuple[tuple[int, ...], str], budget: int, host: int = HOST) -> PartitionPlan | None:
    """None where there is none."""
    try:
        return planner(*case).within(budget, host)
    except ValueError:
        return None


def measured(module: nn.Module, plan: PartitionPlan) -> int:
    """Bytes on the device of a training step, the input and the parameters apart."""
    handle = partition_layers(module, plan, check=False)  # it has a test of its own
    x = torch.randn(SHAPE)
    module(x).sum().backward()  # the first call traces the module, with tensors of its own
    module.zero_grad()
    with ByteMeter() as meter:
        module(x).sum().backward()
    handle.remove()
    return meter.peak


DEEP = ((4, 16, 8), "cpu")
cases = st.sampled_from([DEEP, ((4, 8), "cuda")])  # copies beside the computing, or not
shares = st.floats(0.05, 1.2)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(cases, shares)
def test_neither_the_predicted_nor_the_measured_peak_exceeds_the_budget(case, share):
    budget = int(share * planner(*case).native.peak)
    plan = planned(case, budget)
    if plan is None:
        return
    assert plan.peak_bytes <= budget
    assert measured(network(case[0]), plan) <= budget


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases, st.tuples(shares, shares), st.tuples(shares, shares))
def test_more_budget_is_never_slower_nor_refused(case, gpu, host):
    native = planner(*case).native.peak
    small, large = (planned(case, int(native * choose(gpu)), int(native * choose(host))) for choose in (min, max))
    if small is None:
        return
    assert large is not None
    assert large.seconds <= small.seconds
    for plan, choose in ((small, min), (large, max)):
        assert plan.peak_bytes <= native * choose(gpu)
        assert plan.host_bytes <= native * choose(host)


def test_plans_become_faster_with_the_budget_until_the_module_runs_as_it_is():
    native = planner(*DEEP).native.peak
    plans = [planned(DEEP, int(native * share)) for share in (0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0)]
    assert all(plan is not None for plan in plans)
    seconds = [plan.seconds for plan in plans]
    assert seconds == sorted(seconds, reverse=True)
    assert len(set(seconds)) > 4
    assert plans[-1].mode == "native"


@pytest.mark.parametrize("case", [DEEP, ((4, 8), "cuda"), ((4, 8, 4, 8, 4, 8), "cpu"), ((8, 4, 16), "cuda")])
def test_the_whole_module_again_is_never_faster_than_its_bound(case):
    one = planner(*case)
    for size, bound in one._whole_at_least.items():
        again = one._costs((SegmentMode("recompute"),) * (len(one.cuts) + 1), size)
        assert sum(map(one._seconds, again)) < bound <= one._whole(size).seconds


def test_the_whole_module_again_is_not_simulated_where_a_faster_plan_fits(monkeypatch):
    module = network((8,) * 8)
    policy = PartitionPolicy()
    fresh = Planner(module, SHAPE, policy, torch.float32, None, CPU, ASSUMED["cpu"], None)
    monkeypatch.setattr(fresh, "_whole", lambda size: pytest.fail(f"simulated for chunks of {size}"))
    plan = fresh.within(int(0.3 * fresh.native.peak), HOST)
    assert plan.mode == "partitioned"


def odd() -> nn.Sequential:
    """Norms with and without a gamma, over tiles and images; an activation in place, a dropout, a frozen layer."""
    parts = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU(inplace=True), nn.Dropout(0.5)),
        *(nn.Conv2d(8, 16, 3, stride=2), nn.InstanceNorm2d(16, affine=True), nn.GELU()),
        *(nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6)),
    )
    parts[0].requires_grad_(False)
    return parts


class Residual(nn.Module):
    """Two convolutions beside a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)) for _ in range(2))
        self.beside = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.two(self.one(x).relu()) + self.beside(x)).relu()


def transformer() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=1, embed_dim=48, num_heads=3)


PLAYED = {
    "norms over tiles": (lambda: network((4, 8)), "batch", (6, 3, 16, 16), 2, {}),
    "a residual, one more tile": (
        lambda: nn.Sequential(*network((4,))[:3], Residual()),
        "batch",
        (7, 3, 16, 16),
        2,
        {},
    ),
    "norms of all kinds": (odd, "batch", (6, 3, 16, 16), 2, {}),
    "norms of all kinds, in space": (odd, "spatial", (2, 3, 48, 16), 8, {"overlaps": True}),
    "no graph": (transformer, "batch", (8, 3, 32, 32), 2, {"overlaps": True, "source": InputCost(99, True, 9, True)}),
    "no graph, half precision": (transformer, "batch", (6, 3, 32, 32), 2, {"autocast": torch.bfloat16}),
    "half precision": (lambda: network((4, 8)), "batch", (6, 3, 16, 16), 2, {"autocast": torch.bfloat16}),
    "no batch statistics": (lambda: network((4, 8)).eval(), "spatial", (1, 3, 48, 16), 8, {}),
}


@pytest.mark.parametrize("case", PLAYED)
def test_passes_that_are_played_say_what_every_single_one_says(case):
    make, axis, shape, size, options = PLAYED[case]
    options = {"autocast": None, **options}
    phases = []
    for played in (True, False):
        one = Simulator(make(), axis, CPU, torch.float32, played=played, **options)
        cuts = one.program((SegmentSpec("", "lean", 1),), shape).candidates()
        names = [*(node.name for node in cuts), ""]
        runs = [one.native(shape), one.run((SegmentSpec("", "recompute", size),), shape)]
        kinds = [*((mode, mode == "stream") for mode in MODES), ("checkpoint", True)]
        runs += [one.run(tuple(SegmentSpec(name, mode, size, host) for name in names), shape) for mode, host in kinds]
        mixed = [SegmentSpec(name, *kinds[(index + 3) % 7][:1], size) for index, name in enumerate(names)]
        phases.append([*runs, one.run(tuple(mixed), shape)])
    assert phases[0] == phases[1]


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_a_plan_that_went_through_json_runs_the_same(share):
    plan = planned(DEEP, int(share * planner(*DEEP).native.peak))
    assert plan is not None
    read = PartitionPlan.from_section(json.loads(json.dumps(plan.to_section())))
    gradients = []
    for one in (plan, read):
        module = network(DEEP[0])
        partition_layers(module, one)
        torch.manual_seed(1)
        module(torch.randn(SHAPE)).square().sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))
