"""A step that runs out of device memory is taken once more, from where it began, and then refused by name."""

import pytest
import torch
from torch import nn

from ds_wsi.training import out_of_memory
from ds_wsi.training.out_of_memory import OutOfDeviceMemoryError, with_retry

GPU = torch.device("cuda")


@pytest.fixture
def emptied(monkeypatch):
    """How often torch's cache was emptied."""
    calls: list[None] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(None))
    monkeypatch.setattr(out_of_memory, "device_peaks", lambda _: "as much as there is")
    return calls


def failing(model: nn.BatchNorm1d, times: int):
    """Work that moves the running statistics and fails so many times."""
    left = [times]

    def work() -> str:
        model.running_mean += 1
        left[0] -= 1
        if left[0] >= 0:
            raise torch.OutOfMemoryError("no memory for 3 MiB\nsecond line")
        return "done"

    return work


def test_the_second_try_begins_where_the_first_did(emptied):
    model, again = nn.BatchNorm1d(2), []
    assert with_retry(failing(model, 1), model, model, GPU, again=lambda: again.append(None)) == "done"
    assert model.running_mean.tolist() == [1, 1]  # moved once
    assert len(emptied) == len(again) == 1


def test_twice_is_refused_with_plan_peak_and_option(emptied):
    model = nn.BatchNorm1d(2)
    with pytest.raises(OutOfDeviceMemoryError, match="no memory for 3 MiB") as caught:
        with_retry(failing(model, 2), model, model, GPU, again=lambda: None)
    for words in ("Plan: none", "as much as there is", "--partition auto", "twice"):
        assert words in str(caught.value)


def test_without_a_way_back_there_is_no_second_try(emptied):
    model = nn.BatchNorm1d(2)
    with pytest.raises(OutOfDeviceMemoryError, match="no second try"):
        with_retry(failing(model, 1), model, model, GPU, again=None)
    assert not emptied


def test_a_cpu_and_other_errors_are_left_alone(emptied):
    model = nn.BatchNorm1d(2)
    with pytest.raises(torch.OutOfMemoryError):
        with_retry(failing(model, 1), model, model, torch.device("cpu"), again=lambda: None)

    def broken() -> None:
        raise ValueError("another fault")

    with pytest.raises(ValueError, match="another fault"):
        with_retry(broken, model, model, GPU, again=lambda: None)
    assert not emptied
