"""Which kernels a run chooses: what it leaves alone on a CPU, and that the order of channels changes no result."""

import logging

import pytest
import timm
import torch
from torch import nn

from ds_wsi.engines.machine.kernels import choose_memory_format, choose_tf32, search_kernels
from ds_wsi.models.slide_model import SlideModel

CPU = torch.device("cpu")
SHAPE = (3, 3, 32, 32)


def model() -> SlideModel:
    torch.manual_seed(0)
    return SlideModel(timm.create_model("resnet10t", num_classes=0), nn.Linear(512, 2)).double().eval()


def test_a_cpu_is_left_alone():
    own, before = model(), (torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32)
    assert choose_memory_format(own, "auto", SHAPE, CPU) is None
    choose_tf32("yes", CPU)
    search_kernels(CPU, one_size=True)
    assert (torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32) == before
    tiles = torch.zeros(SHAPE, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    assert own.normalise(tiles).is_contiguous(memory_format=torch.channels_last)  # as it was read


@pytest.mark.parametrize("wanted", ["contiguous", "channels_last"])
def test_the_order_of_channels_changes_no_result(wanted, caplog):
    own = model()
    tiles = torch.randint(0, 256, SHAPE, dtype=torch.uint8)
    expected = own.encode(tiles)
    with caplog.at_level(logging.INFO, logger="ds_wsi"):
        chosen = choose_memory_format(own, wanted, SHAPE, CPU)
    assert wanted in caplog.text
    for given in (tiles, tiles.contiguous(memory_format=torch.channels_last)):
        assert own.normalise(given).is_contiguous(memory_format=chosen)
        torch.testing.assert_close(own.encode(given), expected, rtol=1e-12, atol=1e-12)


def test_an_encoder_without_convolutions_has_no_format():
    own = SlideModel(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)), nn.Linear(4, 2))
    assert choose_memory_format(own, "channels_last", SHAPE, CPU) is None
