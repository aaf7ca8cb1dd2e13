"""`launch/train.py` on the simulated device: the CPU's losses."""

import json
from pathlib import Path
from typing import Any

import pytest

from .lane import ROOT, measure

CONFIGS = ROOT / "ds_configs"
OFFLOAD = ["--partition", "offload", "--partition_chunk_size", "2"]
STACKED = ["--bags_per_step", "8", "--virtual_workers", "2"]


def options(manifest: Path, *more: str) -> list[str]:
    """A run of some seconds, whose losses depend on no random number of the device and on no order of ranks."""
    common = ["--manifest", str(manifest), "--tile_size_px", "64", "--encoder", "resnet10t", "--num_train_epochs", "1"]
    common += ["--tiles_per_slide", "6", "--eval_tiles", "6", "--dataloader_num_workers", "0", "--augment_colour", "0"]
    # The trial that "auto" makes takes longer than the epoch.
    common += ["--norm_training", "bag", "--norm_evaluation", "running", "--memory_format", "contiguous"]
    return [*common, *more]


def with_torch_adam(name: str, folder: Path) -> str:
    """A config whose CPUAdam, which takes minutes to compile, gives way to torch's Adam."""
    config = json.loads((CONFIGS / name).read_text(encoding="utf-8"))
    config["optimizer"]["params"]["torch_adam"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    path = folder / name
    path.write_text(json.dumps(config), encoding="utf-8")
    return str(path)


def close_to(expected: dict[str, Any]) -> dict[str, Any]:
    """The same losses."""
    return {name: pytest.approx(expected[name], rel=1e-5) for name in ("train_loss", "eval_loss")}


def losses(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("train_loss", "eval_loss")}


@pytest.fixture(scope="module")
def on_cpu(demo_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The runs' losses without a device."""
    runs = {"plain": [], "stacked": STACKED, "adam": ["--optim", "adam"]}
    given = {name: options(demo_manifest, *more) for name, more in runs.items()}
    return measure("runs", str(tmp_path_factory.mktemp("cpu")), json.dumps(given), schedule="")


def test_the_main_job_has_the_losses_of_the_cpu(
    demo_manifest: Path, tmp_path: Path, on_cpu: dict[str, dict[str, Any]]
) -> None:
    runs = {"plain": ["--memory_format", "auto"], "offload": OFFLOAD, "validated beside": ["--validate_beside"]}
    given = {name: options(demo_manifest, *more) for name, more in runs.items()}
    results = measure("runs", str(tmp_path), json.dumps(given))
    for name, one in results.items():
        assert losses(one) == close_to(on_cpu["plain"]), name
        assert one["allocated"] > 2**24, name


def test_where_no_memory_can_be_locked_the_losses_are_the_same(
    demo_manifest: Path, tmp_path: Path, on_cpu: dict[str, dict[str, Any]]
) -> None:
    """A container with a limit, or WSL: stacks, and what is offloaded, are in pageable memory."""
    given = {"offload": options(demo_manifest, *OFFLOAD)}
    results = measure("runs", str(tmp_path), json.dumps(given), SIMULATED_CUDA_LOCKED_MIB="0")
    assert losses(results["offload"]) == close_to(on_cpu["plain"])


def test_every_config_trains_as_without_deepspeed(
    demo_manifest: Path, tmp_path: Path, on_cpu: dict[str, dict[str, Any]]
) -> None:
    """But for tile_parallel.json, which takes two ranks: see test_ranks.py."""
    runs = {
        "offload": ["--deepspeed", with_torch_adam("offload.json", tmp_path), *OFFLOAD],
        "dmgc": ["--deepspeed", str(CONFIGS / "dmgc.json")],
        "papers": ["--deepspeed", str(CONFIGS / "papers.json"), "--optim", "adam"],
        "stacking": ["--deepspeed", str(CONFIGS / "stacking.json")],
    }
    expected = {"offload": "plain", "dmgc": "plain", "papers": "adam", "stacking": "stacked"}
    assert {f"{name}.json" for name in runs} | {"tile_parallel.json"} == {path.name for path in CONFIGS.iterdir()}
    given = {name: options(demo_manifest, *more) for name, more in runs.items()}
    results = measure("runs", str(tmp_path / "runs"), json.dumps(given), schedule="late_writes")
    for name, one in results.items():
        assert losses(one) == close_to(on_cpu[expected[name]]), name
        assert 2**24 < one["allocated"] < 2**29, name  # empty buckets took gigabytes
