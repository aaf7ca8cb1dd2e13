"""The simulated device itself: what it computes, what it counts, what it refuses."""

import pytest

from .lane import SCHEDULES, measure


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_device_computes_as_the_cpu_and_fails_as_a_gpu(schedule: str) -> None:
    results = measure("basics", schedule=schedule)
    assert results["name"] == "Simulated CUDA device"
    assert results["plain"] == results["foreach"] == 0.0
    assert results["fused"] < 1e-6
    assert results["mismatch"].startswith("RuntimeError: Expected all tensors to be on the same device")
    assert results["scalar"] == ""
    assert results["fresh"]
    assert results["drawn_again"]
    assert results["inference"] == 0.0
    assert results["invstd"] == [0.0] * 4
    assert results["half"] == {"hidden": "torch.float16", "mean": "torch.float32"}
    allocator, registered, unregistered = results["page_locked"]
    assert 1000 <= allocator <= 1024
    assert (registered, unregistered) == (5000, 0)
    assert results["retries"] == 1
    assert results["out_of_memory"].startswith("OutOfMemoryError: CUDA out of memory")
    assert results["kernels"] == 0


def test_work_happens_as_late_as_the_schedule_allows() -> None:
    expected = {
        "late_copies": {"copy out": "late", "copy back": "late", "kernel": "at once", "waited for": True},
        "late_writes": {"copy out": "at once", "copy back": "at once", "kernel": "late", "waited for": True},
    }
    for schedule, answers in expected.items():
        assert measure("lateness", schedule=schedule) == answers, schedule
