"""Device memory and page-locked memory of the partition, by the allocator's own statistics."""

import pytest

from .lane import measure


def test_what_is_in_flight_is_within_the_plan() -> None:
    """Copies end as late as they may: nothing but the limit on them bounds the memory that they hold."""
    measured = measure("memory", "flight", "after_larger")
    flight = measured["flight"]
    limit = flight["plan"] + 2 * flight["map"]
    assert flight["sent"] > 10 * limit  # or nothing was offloaded
    for phase in ("forward", "backward"):
        assert flight[phase]["active"] <= limit, phase
        assert flight[phase]["reserved"] <= 1.25 * limit, phase
    assert (flight["retries_before"], flight["retries"]) == (1, 0)  # those of the step alone
    assert flight["fetched"] <= 1.1 * flight["sent"]
    assert flight["locked_peak"] <= 1.1 * flight["host_peak"]
    # And however large an earlier call's tensors were.
    after = measured["after_larger"]
    assert after["active"] <= after["plan"] + 2 * flight["map"] < after["larger_map"]


def test_a_second_plan_has_the_budget_of_the_first() -> None:
    first, *later = measure("memory", "budgets", SIMULATED_CUDA_MIB="400")["budgets"]
    assert later == [pytest.approx(first, rel=0.05)] * 2


def test_page_locked_memory_is_what_is_held() -> None:
    for state in measure("memory", "page_locked")["page_locked"]:
        assert state["held"] <= state["locked"] <= 1.1 * state["held"]


def test_locked_memory_that_is_refused_is_pageable_and_right() -> None:
    results = measure("memory", "refused", SIMULATED_CUDA_LOCKED_MIB="1")["refused"]
    assert results["difference"] < 1e-12
    assert results["sent"] > 2**20
    assert results["stacks"] == [[True, True], [False, True], [False, True], [False, True]]


def test_planning_launches_and_allocates_nothing() -> None:
    plans = measure("memory", "planning")["planning"]
    assert plans.keys() == {"torch.float16", "torch.bfloat16"}
    for kind, plan in plans.items():
        assert plan == {"plan": "partitioned", "kernels": 0, "allocated": 0}, kind


def test_a_channel_without_variance_has_finite_statistics() -> None:
    """One chunk, and all of them; the kernel that gives 1 / sqrt(variance) gives 0 there."""
    results = measure("memory", "uniform")["uniform"]
    for case in results.values():
        assert case["finite"]
        assert case["difference"] < 1e-5
