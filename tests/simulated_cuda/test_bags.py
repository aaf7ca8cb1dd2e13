"""Bags that stay in host memory: the device's memory does not grow with them, and gradients are the CPU's."""

import pytest

from .lane import SCHEDULES, measure


def test_the_memory_of_a_step_does_not_grow_with_the_bag() -> None:
    results = measure("bags", "growth")["growth"]
    for kind in ("active", "allocated"):
        assert results["4096"][kind] <= 1.05 * results["512"][kind], kind


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_buffer_is_laid_anew_only_when_it_was_copied(schedule: str) -> None:
    assert measure("bags", "gradients", schedule=schedule)["gradients"] < 1e-12
