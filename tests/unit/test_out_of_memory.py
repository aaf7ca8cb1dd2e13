"""A step that runs out of device memory is taken once more, from where it began, and then refused by name."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ds_wsi.training import one_step, out_of_memory
from ds_wsi.training.micro_loss import Computed
from ds_wsi.training.micro_step import lay_bags
from ds_wsi.training.out_of_memory import OutOfDeviceMemoryError, naming_no_memory, with_retry

GPU = torch.device("cuda")


@pytest.fixture
def emptied(monkeypatch):
    """How often torch's cache was emptied."""
    calls: list[None] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(None))
    monkeypatch.setattr(out_of_memory, "device_peaks", lambda _: "as much as there is")
    return calls


NO_MEMORY = (
    torch.OutOfMemoryError("no memory for 3 MiB\nsecond line"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
)


def failing(model: nn.BatchNorm1d, times: int, error: Exception = NO_MEMORY[0]):
    """Work that moves the running statistics and fails so many times."""
    left = [times]

    def work() -> str:
        model.running_mean += 1
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return "done"

    return work


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: str(error).split()[-1])
def test_the_second_try_begins_where_the_first_did(emptied, error):
    model, again = nn.BatchNorm1d(2), []
    assert with_retry(failing(model, 1, error), model, model, GPU, again=lambda: again.append(None)) == "done"
    assert model.running_mean.tolist() == [1, 1]  # moved once
    assert len(emptied) == len(again) == 1


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: str(error).split()[-1])
def test_twice_is_refused_with_plan_peak_and_option(emptied, error):
    model = nn.BatchNorm1d(2)
    with pytest.raises(OutOfDeviceMemoryError, match=re.escape(str(error).splitlines()[0])) as caught:
        with_retry(failing(model, 2, error), model, model, GPU, again=lambda: None)
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


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: str(error).split()[-1])
def test_what_cannot_be_taken_twice_is_named_at_once(emptied, error):
    model = nn.BatchNorm1d(2)
    with (
        pytest.raises(OutOfDeviceMemoryError, match="in the optimizer's step, which is not taken twice") as caught,
        naming_no_memory("the optimizer's step", model, GPU),
    ):
        failing(model, 1, error)()
    assert str(error).splitlines()[0] in str(caught.value)
    assert not emptied


@pytest.mark.parametrize("device", [GPU, torch.device("cpu")])
def test_other_errors_keep_their_words(emptied, device):
    model = nn.BatchNorm1d(2)
    for error in (ValueError("another fault"), RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED")):
        with pytest.raises(type(error)) as caught, naming_no_memory("the copy", model, device):
            raise error
        assert caught.value is error
    with pytest.raises(OutOfDeviceMemoryError) as caught, naming_no_memory("the optimizer's step", model, device):
        with_retry(failing(model, 2), model, model, GPU, again=lambda: None)
    assert "twice, the second time" in str(caught.value)
    assert "optimizer's" not in str(caught.value)


class Engine:
    """What a micro-step calls of Accelerate."""

    sync_gradients = True

    def accumulate(self, model):
        return nullcontext()

    def backward(self, loss):
        loss.backward()


def a_run(model: nn.Module, optimizer) -> SimpleNamespace:
    optim = SimpleNamespace(max_grad_norm=0.0)
    return SimpleNamespace(
        accelerator=Engine(),
        model=model,
        module=SimpleNamespace(encoder=model, buffers=model.buffers),
        optimizer=optimizer,
        device=GPU,
        settings=SimpleNamespace(optim=optim),
        stacks=SimpleNamespace(used=lambda: None),
    )


def test_a_step_names_what_lies_outside_of_the_second_try(emptied, monkeypatch):
    """Adam makes its moments in the first step, after forward and backward have fitted."""

    class Full(torch.optim.SGD):
        def step(self, closure=None):
            raise NO_MEMORY[0]

    model = nn.Linear(2, 1)
    run = a_run(model, Full(model.parameters(), lr=0.1))
    computed = Computed(torch.ones(()), 1, None)

    def fits(*_):
        return computed._replace(loss=model(torch.ones(1, 2)).sum())

    with pytest.raises(OutOfDeviceMemoryError, match="in the optimizer's step"):
        one_step._micro_step(run, None, one_step.Weights(1.0, None), lambda: None, fits)


def test_bags_that_do_not_fit_are_named_where_they_are_copied(emptied):
    """The next step's are made ready after this one, whole where the encoder is not partitioned."""

    class Stack:
        def to(self, device, non_blocking):
            raise NO_MEMORY[0]

    run = a_run(nn.Linear(2, 1), None)
    stacking = SimpleNamespace(framework="packing", sample_tiles=0)
    run.settings, run.seed = SimpleNamespace(policies=SimpleNamespace(stacking=stacking)), 0
    run.stacks, run.reads_host_tiles = SimpleNamespace(lays_anew=True, lay=lambda tiles: Stack()), False
    bags = [SimpleNamespace(slide=0, tiles=torch.zeros(2, 3, 4, 4), kept=torch.arange(2))]
    with pytest.raises(OutOfDeviceMemoryError, match="in the copy of whole bags to it, which is not taken twice"):
        lay_bags(run, bags, 0)
