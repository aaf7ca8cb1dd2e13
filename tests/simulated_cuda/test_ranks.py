"""Two ranks on two simulated devices, gloo in NCCL's place: what one process computes."""

import json
from pathlib import Path
from typing import Any

import pytest

from ds_wsi.engines.machine.cpu import free_port

from .lane import environment, measure, run
from .test_runs import CONFIGS, OFFLOAD, options

pytestmark = pytest.mark.launch
SCRIPT = "launch/train.py"


def history(folder: Path) -> dict[str, float]:
    """The history of the only epoch."""
    (epoch,) = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    return epoch


@pytest.fixture(scope="module")
def on_cpu(demo_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One process's losses, without a device."""
    runs = {"two bags": ["--gradient_accumulation_steps", "2"], "one bag": []}
    given = {name: options(demo_manifest, *more) for name, more in runs.items()}
    return measure("runs", str(tmp_path_factory.mktemp("cpu")), json.dumps(given), schedule="")


def test_two_ranks_with_a_bag_each_train_as_one_process(
    demo_manifest: Path, tmp_path: Path, on_cpu: dict[str, dict[str, Any]]
) -> None:
    """DDP of a partitioned encoder; running statistics, and with them eval_loss, are each rank's own."""
    command = ["torchrun", "--standalone", "--nproc_per_node", "2", SCRIPT, *options(demo_manifest, *OFFLOAD)]
    run([*command, "--output_dir", str(tmp_path)], environment("late_copies", SIMULATED_CUDA_DEVICES="2"))
    assert history(tmp_path)["train_loss"] == pytest.approx(on_cpu["two bags"]["train_loss"], rel=1e-5)


def test_two_ranks_that_share_each_bag_train_as_one_process(
    demo_manifest: Path, tmp_path: Path, on_cpu: dict[str, dict[str, Any]]
) -> None:
    """tile_parallel.json, and the trial of memory formats, which must leave a shared population alone."""
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), SCRIPT]
    command += ["--deepspeed", str(CONFIGS / "tile_parallel.json")]
    shared = options(demo_manifest, "--partition", "lean", "--partition_chunk_size", "2", "--memory_format", "auto")
    variables = environment("late_copies", SIMULATED_CUDA_DEVICES="2")
    run([*command, *shared, "--output_dir", str(tmp_path)], variables)
    epoch = history(tmp_path)
    for name in ("train_loss", "eval_loss"):
        assert epoch[name] == pytest.approx(on_cpu["one bag"][name], rel=1e-5), name
