"""The host store on the simulated device, as it is and with each of its waits taken out."""

import pytest

from .lane import SCHEDULES, measure
from .mutations import MUTATIONS


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_store_is_right_and_each_mutation_is_noticed(schedule: str) -> None:
    results = measure("store", schedule, schedule=schedule)
    assert results.pop("") == [], "the store as it is"
    assert list(results) == [mutation.name for mutation in MUTATIONS if schedule in mutation.schedules]
    assert [name for name, noticed in results.items() if not noticed] == []


def test_every_mutation_has_a_schedule_that_must_notice_it() -> None:
    assert all(set(mutation.schedules) & SCHEDULES.keys() for mutation in MUTATIONS)
