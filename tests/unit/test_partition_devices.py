"""A module on several devices, or on one whose random numbers are not set back, is refused by name."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_wsi.partition import PartitionPolicy, check_partition, partition_layers
from ds_wsi.partition.module.devices import refuse_devices

TILES = torch.zeros(4, 3, 8, 8)


def encoder() -> nn.Sequential:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("mode", ["auto", "keep", "recompute", "offload"])
@pytest.mark.parametrize("training", [True, False])
def test_parameters_on_two_devices_are_refused_by_name(mode, training):
    """The first parameter's would be taken for the module's: its generator replayed, its streams waited for."""
    module = encoder().train(training)
    module[4].to("meta")
    partition_layers(module, PartitionPolicy(mode=mode, chunk_size=2))
    with pytest.raises(ValueError, match=r"must lie on one device, cpu, got parameter '4.weight' on meta.*HINT"):
        module(TILES)


def test_mode_paper_and_the_report_refuse_them_too():
    module = encoder()
    module[4].to("meta")
    with pytest.raises(ValueError, match="must lie on one device"):
        partition_layers(module, PartitionPolicy(mode="paper"))
    assert "must lie on one device" in check_partition(module, TILES, ("keep",)).modes[0].reason


def test_a_module_on_two_devices_runs_as_it_is():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    module[1].register_parameter("unused", nn.Parameter(torch.empty(1, device="meta")))
    partition_layers(module, PartitionPolicy(mode="native"))
    assert module(TILES).shape == (4, 4 * 6 * 6)


@pytest.mark.parametrize("kind", ["mps", "xpu", "cuda"])
def test_a_device_whose_random_numbers_are_not_set_back_is_refused(kind):
    with FakeTensorMode():
        module = nn.ParameterDict({"weight": nn.Parameter(torch.empty(2, device=torch.device(kind, 0)))})
    device = module["weight"].device
    if kind == "cuda":
        refuse_devices(module, device)
        return
    with pytest.raises(ValueError, match=f"must compute on a CPU or a CUDA device, got {kind}"):
        refuse_devices(module, device)


def test_buffers_may_lie_on_the_cpu_and_on_no_other_device():
    with FakeTensorMode():
        module = nn.BatchNorm1d(3, device="cuda:0")
    module.register_buffer("table", torch.zeros(3))
    refuse_devices(module, module.weight.device)
    with FakeTensorMode():
        module.register_buffer("other", torch.zeros(3, device="cuda:1"))
    with pytest.raises(ValueError, match=r"buffer 'other' on cuda:1"):
        refuse_devices(module, module.weight.device)


def test_a_module_without_parameters_lies_where_its_buffers_do():
    from ds_wsi.partition.module.devices import device_of

    norm = nn.BatchNorm2d(3, affine=False, device="meta")
    assert device_of(norm, torch.device("cpu")).type == "meta"
    assert device_of(nn.ReLU(), torch.device("cpu")).type == "cpu"
