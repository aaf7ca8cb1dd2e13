"""The partition's memory: constant where it must be, as predicted, and as the formula says."""

import copy

import pytest
import timm
import torch
from torch import nn

from ds_wsi.partition import PartitionPolicy, partition_layers, plan_partition
from ds_wsi.partition.policy import MODES
from ds_wsi.runtime.memory import ByteMeter

SIDE = 16


def measured(module, shape):
    """Peak bytes that a training step allocates on the device, and the same in host memory."""
    x = torch.zeros(shape)
    module(x[:3]).sum().backward()  # traces and plans, which allocate too
    module.zero_grad()
    with ByteMeter() as meter:
        out = module(x)
        kept = meter.live
        out.sum().backward()
    return meter.peak, kept, meter.host_peak


def small(name):
    if name == "small":
        return SmallConvNet()
    options = {"img_size": SIDE, "depth": 2} if "vit" in name else {}
    return timm.create_model(name, num_classes=0, **options)


class SmallConvNet(nn.Sequential):
    """Three train-mode BatchNorms, each of them a pass from the input."""

    num_features = 32

    def __init__(self):
        layers = [
            (nn.Conv2d(a, b, 3, stride=2), nn.BatchNorm2d(b), nn.ReLU()) for a, b in ((3, 16), (16, 32), (32, 32))
        ]
        super().__init__(*(layer for three in layers for layer in three), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("name", ["small", "vit_tiny_patch16_224"])
def test_recompute_holds_as_much_for_4096_tiles_as_for_512(name):
    module = small(name)
    partition_layers(module, PartitionPolicy(mode="recompute", chunk_size=64), check=False)
    few, many = (measured(module, (count, 3, SIDE, SIDE))[0] for count in (512, 4096))
    # The features are the caller's; a bag has one row of them a tile.
    features = module.num_features * 4
    assert many - 4096 * features == pytest.approx(few - 512 * features, rel=0.05)
    native = small(name)
    assert measured(native, (512, 3, SIDE, SIDE))[0] > 1.2 * few


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "count", "side"), [("resnet18", 48, 32), ("vit_tiny_patch16_224", 48, 16)])
def test_the_predicted_peak_is_the_measured_one(name, count, side, mode):
    module = small(name) if "vit" in name else timm.create_model(name, num_classes=0)
    shape = (count, 3, side, side)
    plan = plan_partition(module, shape, PartitionPolicy(mode=mode, chunk_size=4))
    partition_layers(module, plan, check=False)
    peak, _, host = measured(module, shape)
    assert plan.peak_bytes == pytest.approx(peak, rel=0.1)
    if mode in ("offload", "stream"):
        assert plan.host_bytes == pytest.approx(host, rel=0.1)
    else:
        assert plan.host_bytes == host == 0


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_an_automatic_plan_keeps_its_budget(share):
    module = timm.create_model("resnet18", num_classes=0)
    shape = (128, 3, 64, 64)
    native = plan_partition(module, shape, PartitionPolicy())
    gradients = sum(parameter.numel() * 4 for parameter in module.parameters())
    # Of activations: the gradients of the parameters are there in any case.
    budget = int(gradients + share * (native.peak_bytes - gradients))
    plan = plan_partition(module, shape, PartitionPolicy(gpu_budget_bytes=budget))
    assert plan.peak_bytes <= budget
    partition_layers(module, plan, check=False)
    peak, _, host = measured(module, shape)
    assert plan.peak_bytes == pytest.approx(peak, rel=0.1)
    assert plan.host_bytes == pytest.approx(host, rel=0.1, abs=2**20)


def test_the_check_at_the_first_call_keeps_the_budget():
    module = timm.create_model("resnet18", num_classes=0)
    shape = (128, 3, 64, 64)
    native = plan_partition(module, shape, PartitionPolicy())
    gradients = sum(parameter.numel() * 4 for parameter in module.parameters())
    budget = int(gradients + 0.1 * (native.peak_bytes - gradients))
    partition_layers(module, plan_partition(module, shape, PartitionPolicy(gpu_budget_bytes=budget)))
    x = torch.randn(16, *shape[1:])
    with ByteMeter() as meter:
        module(x)
    assert meter.peak <= budget


def test_native_is_predicted_too():
    module = timm.create_model("resnet18", num_classes=0)
    plan = plan_partition(module, (64, 3, 32, 32), PartitionPolicy())
    assert plan.mode == "native"
    assert plan.peak_bytes == pytest.approx(measured(module, (64, 3, 32, 32))[0], rel=0.1)


def test_lean_keeps_the_inputs_of_norms_and_the_outputs_of_blocks():
    """ResNet-18's published formula: per input pixel, in float32, 2 x 140 bytes, the pool's output being the stem's."""
    side, count = 64, 32
    module = timm.create_model("resnet18", num_classes=0)
    partition_layers(module, PartitionPolicy(mode="lean", chunk_size=8), check=False)
    _, kept, _ = measured(module, (count, 3, side, side))
    pixels = count * side * side
    # (elements a pixel) norm inputs and block outputs of the stem and of the four stages.
    stem = 64 / 4 + 64 / 16
    stages = [5 * 64 / 16 - 64 / 16 + 2 * 64 / 16 - 2 * 64 / 16 + 2 * 64 / 16]
    for channels, scale in ((128, 64), (256, 256), (512, 1024)):
        stages.append((5 + 2) * channels / scale)
    expected = 4 * pixels * (stem + sum(stages)) + count * 512 * 4
    last = 4 * pixels * 512 / 1024  # the last block's output goes into the pool, in the segment of the output
    assert kept == pytest.approx(expected - last, rel=0.02)


def test_a_spatial_plan_predicts_its_peak_and_recompute_is_flat_in_height():
    peaks = {}
    for height in (256, 512):
        module = timm.create_model("resnet10t", num_classes=0).eval()
        shape = (1, 3, height, 64)
        plan = plan_partition(module, shape, PartitionPolicy(mode="recompute", axis="spatial", chunk_size=4))
        partition_layers(module, plan, check=False)
        peaks[height] = measured_image(module, shape)
        assert plan.peak_bytes == pytest.approx(peaks[height], rel=0.1)
    native = {
        height: measured_image(timm.create_model("resnet10t", num_classes=0).eval(), (1, 3, height, 64))
        for height in (256, 512)
    }
    # What grows is the last stage's map alone, a thousandth of the pixels with 512 channels.
    assert peaks[512] - peaks[256] < 0.15 * (native[512] - native[256])


def measured_image(module, shape):
    x = torch.zeros(shape)
    module(x).sum().backward()
    module.zero_grad()
    with ByteMeter() as meter:
        module(x).sum().backward()
    return meter.peak


def test_offload_sends_what_native_would_keep_and_brings_it_back():
    module = timm.create_model("resnet18", num_classes=0)
    native = copy.deepcopy(module)
    partition_layers(module, PartitionPolicy(mode="offload", chunk_size=32), check=False)
    x = torch.zeros(32, 3, 32, 32)
    module(x).sum().backward()
    store = module.forward._store
    with ByteMeter() as meter:
        out = native(x)
        kept = meter.live - out.numel() * 4
    # Each tensor goes once, however many operations saved it.
    assert store.sent_bytes == pytest.approx(kept, rel=0.05)
    assert store.fetched_bytes >= 0.95 * store.sent_bytes
    assert store.held_bytes == 0
