"""The peers that need a GPU have native gradients on the simulated device, and need fewer bytes."""

import pytest

from .lane import measure


@pytest.mark.parametrize("schedule", ["late_copies", "late_writes"])
def test_peers_have_native_gradients_in_fewer_bytes(schedule: str) -> None:
    found = measure("peers", schedule=schedule)
    assert sum("deepspeed" in name for name in found) == 3
    for name, one in found.items():
        assert one["difference"] < 1e-4, name
        assert one["bytes"] < (0.6 if name.startswith(("vit", "of_transformers")) else 0.95), name
