"""Skips the lane, with the reason, where the device cannot be simulated."""

from pathlib import Path

import pytest

from .lane import FOLDER, missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in Path(item.path).parents and missing():
            item.add_marker(pytest.mark.skip(reason=missing()))
