"""The simulated device itself: what it computes, what it counts, what it refuses."""

import pytest

from .lane import SCHEDULES, measure


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_device_computes_as_the_cpu_and_fails_as_a_gpu(schedule: str) -> None:
    found = measure("basics", schedule=schedule)
    assert found["name"] == "Simulated CUDA device"
    assert found["plain"] == found["foreach"] == 0.0
    assert found["fused"] < 1e-6
    assert found["mismatch"].startswith("RuntimeError: Expected all tensors to be on the same device")
    assert found["scalar"] == ""
    assert found["fresh"]
    assert found["drawn_again"]
    assert found["inference"] == 0.0
    assert found["invstd"] == [0.0] * 4
    assert found["half"] == {"hidden": "torch.float16", "mean": "torch.float32"}
    allocator, registered, unregistered = found["page_locked"]
    assert 1000 <= allocator <= 1024
    assert (registered, unregistered) == (5000, 0)
    assert found["retries"] == 1
    assert found["out_of_memory"].startswith("OutOfMemoryError: CUDA out of memory")
    assert found["kernels"] == 0


def test_work_happens_as_late_as_the_schedule_allows() -> None:
    expected = {
        "late_copies": {"copy out": "late", "copy back": "late", "kernel": "at once", "waited for": True},
        "late_writes": {"copy out": "at once", "copy back": "at once", "kernel": "late", "waited for": True},
    }
    for schedule, found in expected.items():
        assert measure("lateness", schedule=schedule) == found, schedule
