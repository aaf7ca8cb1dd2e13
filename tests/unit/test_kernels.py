"""The kernels that a run chooses: what it leaves alone on a CPU, and that the order of channels changes no result."""

import logging

import pytest
import timm
import torch
from torch import nn

from ds_wsi.engines.machine import kernels
from ds_wsi.engines.machine.kernels import choose_memory_format, choose_tf32, search_kernels
from ds_wsi.models.slide_model import SlideModel

CPU = torch.device("cpu")
SHAPE = (3, 3, 32, 32)


def model() -> SlideModel:
    torch.manual_seed(0)
    return SlideModel(timm.create_model("resnet10t", num_classes=0), nn.Linear(512, 2)).double().eval()


def test_a_cpu_is_left_alone():
    slide_model, before = model(), (torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32)
    assert choose_memory_format(slide_model, "auto", SHAPE, CPU) is None
    choose_tf32("yes", CPU)
    search_kernels(CPU, one_size=True)
    assert (torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32) == before
    tiles = torch.zeros(SHAPE, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    assert slide_model.normalise(tiles).is_contiguous(memory_format=torch.channels_last)  # as it was read


@pytest.mark.parametrize("wanted", ["contiguous", "channels_last"])
def test_the_order_of_channels_changes_no_result(wanted, caplog):
    slide_model = model()
    tiles = torch.randint(0, 256, SHAPE, dtype=torch.uint8)
    expected = slide_model.encode(tiles)
    with caplog.at_level(logging.INFO, logger="ds_wsi"):
        chosen = choose_memory_format(slide_model, wanted, SHAPE, CPU)
    assert wanted in caplog.text
    for given in (tiles, tiles.contiguous(memory_format=torch.channels_last)):
        assert slide_model.normalise(given).is_contiguous(memory_format=chosen)
        torch.testing.assert_close(slide_model.encode(given), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("fit", "sizes"), [(9, [8]), (5, [8, 4]), (2, [8, 4, 2]), (1, [8, 4, 2])])
def test_a_trial_that_does_not_fit_takes_fewer_tiles(fit, sizes, monkeypatch, caplog):
    """It is of the whole encoder, before there is a partition: what trains in chunks may not fit it as it is."""
    tried, emptied = [], []
    errors = torch.OutOfMemoryError("full"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    def seconds(encoder, memory_format, shape, device):
        if memory_format == torch.contiguous_format:
            return 1.0
        tried.append(shape[0])
        if shape[0] > fit:
            raise errors[len(tried) % 2]
        return 0.5

    monkeypatch.setattr(kernels, "_step_seconds", seconds)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(None))
    with caplog.at_level(logging.INFO, logger="ds_wsi"):
        chosen = choose_memory_format(model(), "auto", (8, 3, 32, 32), torch.device("cuda"))
    assert tried == sizes
    assert len(emptied) == sum(size > fit for size in sizes)
    if fit > 1:
        assert (chosen, f"a trial of {sizes[-1]} tiles" in caplog.text) == (torch.channels_last, True)
    else:
        assert chosen == torch.contiguous_format
        assert "contiguous, because the trial does not fit the device" in caplog.text


def test_a_trial_that_fails_otherwise_fails(monkeypatch):
    def seconds(*_):
        raise RuntimeError("expected 4 channels")

    monkeypatch.setattr(kernels, "_step_seconds", seconds)
    with pytest.raises(RuntimeError, match="expected 4 channels"):
        choose_memory_format(model(), "auto", (8, 3, 32, 32), torch.device("cuda"))


def test_an_encoder_without_convolutions_has_no_format():
    slide_model = SlideModel(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)), nn.Linear(4, 2))
    assert choose_memory_format(slide_model, "channels_last", SHAPE, CPU) is None
