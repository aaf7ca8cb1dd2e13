"""When the check at the first call is done, what it costs, what it leaves, and what the report says of it."""

import copy
import logging
import random

import numpy as np
import pytest
import torch
from check_cases import Attention, Neighbours, Net, Remembers, call, group_norm, tiles
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import ds_wsi
from ds_wsi.partition import PartitionPlan, PartitionPolicy, partition_layers
from ds_wsi.partition.checking.case import Case
from ds_wsi.partition.checking.check import check_case, sample_of, tiles_that_fit
from ds_wsi.partition.checking.verdict import Verdict
from ds_wsi.partition.forward import PartitionedForward
from ds_wsi.partition.module.arguments import Arguments
from ds_wsi.partition.policy import MODES


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_a_larger_bag_is_checked_again_where_the_first_was_too_small():
    net = Net(group_norm, Neighbours()).double()
    assert call(net, tiles(1)).shape == (1, 6)
    with pytest.raises(ValueError, match=r"'middle' \(Neighbours\) must treat tiles independently"):
        call(net, tiles(3))


# --------------------------------------------------------------------------------------------------- it leaves nothing


def test_a_run_is_the_same_with_and_without_the_check():
    runs = []
    for check in (True, False):
        torch.manual_seed(0)
        net = Net(middle=nn.Dropout(0.3)).double()
        partition_layers(net, PartitionPolicy(mode="lean", chunk_size=3), check=check)
        random.seed(0)
        np.random.seed(0)
        out = net(tiles())
        out.square().sum().backward()
        state = [*net.buffers(), *(parameter.grad for parameter in net.parameters())]
        runs.append([out.detach(), *state, torch.rand(3), torch.tensor([random.random(), np.random.rand()])])
    assert all(map(torch.equal, *runs))


def test_nothing_of_the_module_changes_and_no_hook_fires():
    net = Net().double()
    fired = []
    net.c2.weight.register_hook(lambda grad: fired.append("tensor"))
    net.c1.weight.grad = torch.ones_like(net.c1.weight)
    for part in (net.act, net.c3):
        part.register_forward_hook(lambda *_: fired.append("module"))
        part.register_full_backward_hook(lambda *_: fired.append("backward"))
    before = [(name, id(item), item._version, item.clone()) for name, item in net.state_dict(keep_vars=True).items()]
    held = {part: dict(part.__dict__) for part in net.modules()}
    case, sample = case_of(net)
    fired.clear()  # the plan's own trace
    assert check_case(case, sample) == ""
    assert fired == []
    after = [(name, id(item), item._version) for name, item in net.state_dict(keep_vars=True).items()]
    assert [entry[:3] for entry in before] == after
    assert all(torch.equal(item, net.state_dict()[name]) for name, _, _, item in before)
    assert torch.equal(net.c1.weight.grad, torch.ones_like(net.c1.weight))
    assert all(parameter.grad is None for name, parameter in net.named_parameters() if name != "c1.weight")
    for part, content in held.items():
        assert part.__dict__.keys() == content.keys()
        assert all(part.__dict__[key] is value for key, value in content.items())


def case_of(net, mode="lean", backward=True):
    forward = PartitionedForward(net, PartitionPolicy(mode=mode, chunk_size=3))
    device = torch.device("cpu")
    plan = forward.plan(tiles(), device, torch.float64)
    case = Case(net, net.forward, forward.on_trial, plan, Arguments(), device, backward, False)
    return case, sample_of(case, tiles(), 8)


def test_it_costs_ten_tiles_once_for_each_kind_of_call(monkeypatch):
    class Stem(nn.Conv2d):
        def forward(self, x):
            if not isinstance(x, FakeTensor):  # which has no values to compute with
                seen.append(len(x))
            return super().forward(x)

    seen = []
    net = Net(group_norm).double()
    net.c1 = Stem(3, 8, 3, padding=1).double()
    partition_layers(net, PartitionPolicy(mode="keep", chunk_size=8))
    seen.clear()
    for _ in range(3):
        net(tiles(8)).sum().backward()
    assert seen == [4, 3, 1, 8, 8, 8]  # alone, in two chunks; then the calls
    seen.clear()
    net.c1.weight.requires_grad_(False)
    net(tiles(8)).sum().backward()
    assert seen == [4, 3, 1, 8]
    seen.clear()
    with torch.no_grad():
        net.eval()(tiles(8))
        net(tiles(8))
    assert seen == [4, 3, 1, 8, 8]


@pytest.mark.parametrize("change", ["part", "forward", "attribute", "flags", "shape"])
def test_a_call_of_another_kind_is_checked_again(change, caplog):
    caplog.set_level(logging.DEBUG, logger="ds_wsi")
    net = Net(group_norm, Remembers()).double()
    net.middle.size = 12
    x = tiles()
    call(net, x, mode="recompute")
    assert caplog.text.count("is exact in") == 1
    call(net, x)
    assert caplog.text.count("is exact in") == 1
    if change == "part":
        net.middle = nn.Tanh()
    elif change == "forward":
        net.middle.forward = torch.tanh
    elif change == "attribute":
        net.middle.size = 13
    elif change == "flags":
        net.eval()
    else:
        x = tiles(side=16)
    call(net, x)
    assert caplog.text.count("is exact in") == 2


def test_it_is_switched_off_by_argument_policy_and_mode():
    for options, policy in (({"check": False}, {}), ({}, {"check": False}), ({}, {"mode": "native"})):
        net = Net(group_norm, Attention()).double()
        partition_layers(net, PartitionPolicy(**{"mode": "lean", "chunk_size": 3} | policy), **options)
        assert net(tiles()).shape == (7, 6)


def test_copies_of_the_module_check_anew():
    net = Net(group_norm, Neighbours()).double()
    partition_layers(net, PartitionPolicy(mode="lean", chunk_size=3))
    with pytest.raises(ValueError, match="must treat tiles independently"):
        copy.deepcopy(net)(tiles())


def test_a_plan_with_a_budget_takes_fewer_tiles():
    plan = PartitionPlan((), "batch", "stack", (10, 3, 12, 12), native_peak_bytes=1000, gpu_budget_bytes=600)
    assert [tiles_that_fit(plan, count) for count in (1, 3, 5, 9)] == [1, 3, 4, 4]


def test_what_takes_no_smaller_image_is_not_checked_and_says_so(caplog):
    caplog.set_level(logging.DEBUG, logger="ds_wsi")
    net = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.Flatten(), nn.Linear(180 * 180, 2)).double()
    partition_layers(net, PartitionPolicy(mode="lean", axis="spatial", chunk_size=60))
    net(tiles(1, 180)).sum().backward()
    assert "Sequential is not checked: RuntimeError: mat1 and mat2 shapes" in caplog.text


# --------------------------------------------------------------------------------------------------------- the report


def test_the_report_says_what_is_exact_and_what_it_costs(capsys):
    net = Net().double()
    before = copy.deepcopy(net.state_dict())
    report = ds_wsi.check_partition(net, tiles(), chunk_size=3)
    assert report.exact == ("native", *MODES)
    assert all(entry.bytes_per_tile > 0 and entry.seconds_per_tile > 0 for entry in report.modes)
    assert report.modes[0].bytes_per_tile > next(e for e in report.modes if e.mode == "recompute").bytes_per_tile
    assert str(report) in capsys.readouterr().out
    assert all(torch.equal(before[name], item) for name, item in net.state_dict().items())
    assert "forward" not in net.__dict__


def test_the_report_says_why_a_mode_is_refused(capsys):
    report = ds_wsi.check_partition(Net(group_norm, Attention()).double(), tiles(), modes=("native", "lean"))
    assert report.exact == ("native",)
    assert "'middle' (Attention) must treat tiles independently" in capsys.readouterr().out
    with pytest.raises(ValueError, match="modes must be among native, keep"):
        ds_wsi.check_partition(Net(), tiles(), modes=("auto",))
    with pytest.raises(ValueError, match="example must hold tiles"):
        ds_wsi.check_partition(Net(), tiles(0))


def test_a_module_that_is_wrong_in_one_tile_alone_is_taken_where_no_chunk_has_one():
    """Torch's BatchNorm on a CPU is wrong so for a transposed gradient; with chunks of two, one tile can remain."""

    class WrongAlone(nn.Module):
        def forward(self, x):
            return x * 2 if len(x) == 1 else x

    module = nn.Sequential(nn.Conv2d(3, 4, 3), WrongAlone(), nn.ReLU()).double()
    partition_layers(module, PartitionPolicy(mode="recompute", chunk_size=3))
    plain = copy.deepcopy(module[0])
    x = tiles(7)
    torch.testing.assert_close(module(x), plain(x).relu())
    other = nn.Sequential(nn.Conv2d(3, 4, 3), WrongAlone()).double()
    partition_layers(other, PartitionPolicy(mode="recompute", chunk_size=2))
    with pytest.raises(ValueError, match=r"must treat tiles independently|must be computed in a partition"):
        other(tiles(7))


def test_what_hangs_on_odd_and_even_places_in_a_chunk_is_seen():
    class EverySecond(nn.Module):
        def forward(self, x):
            return torch.cat([x[::2] * 2, x[1::2]])[torch.arange(len(x)).argsort()]

    module = nn.Sequential(nn.Conv2d(3, 4, 3), EverySecond()).double()
    partition_layers(module, PartitionPolicy(mode="recompute", chunk_size=4))
    with pytest.raises(ValueError, match="EverySecond"):
        module(tiles(8))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("full"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")],
    ids=["of torch", "of cuBLAS"],
)
@pytest.mark.parametrize("method", ["_partition", "_mixing"])
def test_a_check_that_the_device_has_no_memory_for_refuses_nothing(error, method, caplog, monkeypatch):
    def full(*_):
        raise error

    monkeypatch.setattr(Verdict, method, full)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).double()
    if method == "_mixing":  # asked where something differs
        monkeypatch.setattr(Verdict, "_compared", lambda verdict, *_, **__: verdict._mixing())
    with caplog.at_level(logging.DEBUG, logger="ds_wsi"):
        call(net)
    assert "is not checked: the device's memory does not hold it" in caplog.text
