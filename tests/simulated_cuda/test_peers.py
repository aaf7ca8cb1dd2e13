"""The peers that need a GPU have native gradients on the simulated device, and need fewer bytes."""

import pytest

from .lane import measure


@pytest.mark.slow  # beside the lane, which has four minutes
def test_peers_have_native_gradients_in_fewer_bytes() -> None:
    results = measure("peers")
    assert sum("deepspeed" in name for name in results) == 3
    for name, one in results.items():
        assert one["difference"] < 1e-4, name
        # The small ResNet's most bytes are in its stem, before the blocks.
        assert one["bytes"] <= (1.0 if name.startswith("resnet") else 0.3), name
