import copy
import json
import pwd

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from ds_wsi.cli import main
from ds_wsi.config import DsWsiConfig, read_section, write_section
from ds_wsi.partition import PartitionPlan, PartitionPolicy, partition_layers, plan_partition
from ds_wsi.partition.planning import rates as planning_rates
from ds_wsi.partition.planning.rates import ASSUMED, Rates, find_rates
from ds_wsi.runtime.units import parse_bytes

SHAPE = (64, 3, 32, 32)


@pytest.fixture(scope="module")
def resnet():
    return timm.create_model("resnet18", num_classes=0)


@pytest.fixture(scope="module")
def tight(resnet):
    """A plan within less than native takes, most of which is the parameters' gradients, and the budget."""
    native = plan_partition(resnet, SHAPE, PartitionPolicy())
    budget = int(native.native_peak_bytes * 0.88)
    return plan_partition(resnet, SHAPE, PartitionPolicy(gpu_budget_bytes=budget, host_budget_bytes=2**30)), budget


def test_what_fits_runs_as_it_is(resnet):
    plan = plan_partition(resnet, SHAPE, PartitionPolicy())
    assert plan.mode == "native"
    assert plan.segments == ()
    assert "native, it fits as it is" in str(plan)
    module = copy.deepcopy(resnet)
    partition_layers(module, plan)
    x = torch.randn(8, 3, 32, 32)
    assert torch.equal(module(x), copy.deepcopy(resnet)(x))


def test_a_plan_is_within_the_budget_cheaper_in_memory_and_dearer_in_time(tight):
    plan, budget = tight
    assert plan.mode == "partitioned"
    assert plan.peak_bytes <= budget < plan.native_peak_bytes
    assert plan.seconds > plan.native_seconds
    assert plan.segments[-1].last == ""
    assert max(part.peak_bytes for part in plan.segments) == plan.peak_bytes
    assert len(plan.timeline) == 2 * len(plan.segments)


def test_planning_changes_nothing(resnet):
    module = copy.deepcopy(resnet)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = torch.get_rng_state()
    plan_partition(module, SHAPE, PartitionPolicy(mode="recompute", chunk_size=16))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_table_names_every_segment(tight):
    lines = str(tight[0]).splitlines()
    assert len(lines) == 2 + len(tight[0].segments)
    for line, part in zip(lines[2:], tight[0].segments, strict=True):
        assert line.startswith(part.last or "output")
        assert f" {part.mode} " in line
    assert "rates assumed" in lines[0]


def test_it_goes_through_the_json_section(tight):
    config = DsWsiConfig(partition=tight[0])
    assert read_section(json.loads(json.dumps(write_section(config)))) == config
    with pytest.raises(ValueError, match=r"^ds_wsi\.partition\.plan must be what `ds-wsi plan` wrote"):
        read_section({"partition": {"plan": {"segments": [{"last": ""}]}}})
    with pytest.raises(ValueError, match=r"^ds_wsi\.partition\.mode must be one of plan"):
        read_section({"partition": {"plan": {}, "mode": "auto"}})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"mode": "fast"}, r"^ds_wsi\.partition: mode must be one of auto, keep, lean, .* got 'fast'"),
        ({"axis": "tiles"}, r"axis must be one of batch, spatial, got 'tiles'"),
        ({"bn_population": "slide"}, r"bn_population must be one of stack, bag, got 'slide'"),
        ({"chunk_size": 0}, r"chunk_size must be positive or null, got 0"),
        ({"chunk_size": 1.5}, r"^ds_wsi\.partition\.chunk_size must be a whole number or null, got 1\.5"),
        ({"gpu_budget_bytes": "much"}, r"^ds_wsi\.partition\.gpu_budget_bytes must be bytes such as 24GiB"),
        ({"budget": 1}, r"^ds_wsi\.partition\.budget must be one of mode, axis, chunk_size, gpu_budget_bytes"),
    ],
)
def test_a_wrong_section_is_refused_by_its_key(section, message):
    with pytest.raises(ValueError, match=message):
        read_section({"partition": section})


def test_the_section_reads_sizes_with_units_and_is_off_by_default():
    assert read_section({}).partition.mode == "native"
    policy = read_section({"partition": {"gpu_budget_bytes": "24GiB", "host_budget_bytes": None}}).partition
    assert policy == PartitionPolicy(gpu_budget_bytes=24 * 2**30)


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * 2**30), ("1.5 GB", 1_500_000_000), ("7", 7), (" 2kib ", 2048)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "24 giga", "0"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="must be"):
        parse_bytes(text)


def test_an_impossible_budget_is_refused_with_the_bytes_that_are_missing(resnet):
    with pytest.raises(
        ValueError, match=r"nearest plan lacks [\d,]+ bytes on the device and 0 on the host .* HINT: raise"
    ):
        plan_partition(resnet, SHAPE, PartitionPolicy(gpu_budget_bytes=2**20, chunk_size=32))
    with pytest.raises(ValueError, match=r"lacks 0 bytes on the device and [\d,]+ on the host"):
        plan_partition(resnet, SHAPE, PartitionPolicy(mode="stream", chunk_size=32, host_budget_bytes=2**20))
    with pytest.raises(ValueError, match=r"input_shape must be \[N, \.\.\.\], all positive, got \[0, 3, 8, 8\]"):
        plan_partition(resnet, (0, 3, 8, 8))


@pytest.mark.parametrize("axis", ["batch", "spatial"])
@pytest.mark.parametrize("frozen", ["first layers", "all", "none"])
def test_an_encoder_whose_first_layers_are_frozen_is_planned_and_trained(frozen, axis):
    encoder = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    parts = {"first layers": encoder[:5], "all": encoder, "none": encoder[:0]}[frozen]
    parts.requires_grad_(False)
    x = torch.randn((12, 3, 20, 20) if axis == "batch" else (1, 3, 64, 20))
    native = plan_partition(encoder, x.shape, PartitionPolicy(axis=axis)).native_peak_bytes
    size = 2 if axis == "batch" else 16
    policies = [PartitionPolicy(axis=axis, mode="keep", chunk_size=size)]
    if frozen != "all":  # then there is nothing to save
        policies.append(PartitionPolicy(axis=axis, gpu_budget_bytes=int(0.7 * native), chunk_size=size))
    for policy in policies:
        plan = plan_partition(encoder, x.shape, policy)
        assert plan.mode == "partitioned"
        assert len(plan.timeline) == 2 * len(plan.segments)
        plain, parted = copy.deepcopy(encoder).double(), copy.deepcopy(encoder).double()
        partition_layers(parted, plan)
        for module in (plain, parted):
            out = module(x.double()).square().sum()
            if frozen != "all":
                out.backward()
        for one, other in zip(plain.parameters(), parted.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None) == (not one.requires_grad)
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-10)


def test_a_faster_link_moves_the_plan_from_recomputing_to_the_host():
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=4)
    shape = (1024, 3, 32, 32)
    budget = plan_partition(encoder, shape).native_peak_bytes // 2
    policy = PartitionPolicy(gpu_budget_bytes=budget, host_budget_bytes=2**32, chunk_size=128)
    modes = {}
    for link in (1e6, 1e12):
        rates = Rates(flops=1e11, memory=1e11, link=link, launch=0.0)
        modes[link] = plan_partition(encoder, shape, policy, rates=rates).segments[0].mode
    assert modes == {1e6: "recompute", 1e12: "offload"}


def test_a_mixed_precision_plan_keeps_half_the_bytes():
    encoder = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32)
    )
    policy = PartitionPolicy(mode="lean", chunk_size=4)
    full, half = (
        plan_partition(encoder, (32, 3, 32, 32), policy, autocast=dtype).segments[0].device_bytes
        for dtype in (None, torch.bfloat16)
    )
    assert half == pytest.approx(full / 2, rel=0.05)


def test_the_command_prints_writes_and_draws(tmp_path, capsys):
    budget = ["--gpu", "56MiB", "--host", "1GiB", "--device", "cpu", "--chunk_size", "32"]
    status = main(
        [
            "plan",
            "--encoder",
            "resnet18",
            "--tiles",
            "64",
            "--tile-size-px",
            "32",
            *budget,
            "--output_dir",
            str(tmp_path),
        ]
    )
    assert status == 0
    assert "segment up to" in capsys.readouterr().out
    section = json.loads((tmp_path / "plan.json").read_text())["ds_wsi"]
    assert isinstance(read_section(section).partition, PartitionPlan)
    with Image.open(tmp_path / "plan.png") as picture:
        assert min(picture.size) > 400
    assert main(["plan", "--encoder", "resnet18"]) == 2
    assert main(["plan", "--encoder", "resnet10t", "--tiles", "4", "--gpu", "1MiB", "--tile_size_px", "32"]) == 2


def test_measured_rates_are_kept_and_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu = torch.device("cpu")
    assert find_rates(cpu) == ASSUMED["cpu"]
    assert main(["plan", "--probe"]) == 0
    assert "TFLOP/s" in capsys.readouterr().out
    rates = find_rates(cpu)
    assert rates.measured
    assert min(rates.flops, rates.memory, rates.link, rates.launch) > 0
    (tmp_path / "ds_wsi" / "rates.json").write_text("not a table")
    assert find_rates(cpu) == ASSUMED["cpu"]


@pytest.mark.parametrize("place", ["no home", "no folder"])
def test_rates_that_cannot_be_kept_are_measured_all_the_same(place, tmp_path, monkeypatch, capsys):
    """A pod's user can have neither a name nor a home."""
    if place == "no home":
        for name in ("HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(planning_rates, "_seconds", lambda work, device: 1e-3)
    words = ["plan", "--encoder", "test_resnet", "--tiles", "2", "--gpu", "1GiB", "--tile_size_px", "32"]
    assert main([*words, "--probe", "--device", "cpu"]) == 0
    told = capsys.readouterr()
    assert "TFLOP/s" in told.out
    assert "rates assumed" in told.out
    assert "the rates are not kept" in told.err
    assert find_rates(torch.device("cpu")) == ASSUMED["cpu"]
