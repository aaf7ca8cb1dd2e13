"""The partition on the simulated device: the same numbers in every mode, however late the device is."""

import pytest

from ds_wsi.partition.policy import MODES

from .lane import SCHEDULES, measure

TOLERANCE = 1e-12  # relative, in float64: sums over chunks round differently from sums over bags


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_mode_equals_the_module_as_it_is(schedule: str) -> None:
    results = measure("modes", schedule=schedule)
    assert {f"{mode}, {axis}" for mode in MODES for axis in ("batch", "spatial")} < results.keys()
    assert {case: worst for case, worst in results.items() if worst > TOLERANCE} == {}
