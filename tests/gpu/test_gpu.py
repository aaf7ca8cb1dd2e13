"""The main job on a CUDA device."""

import json
import os

import pytest

from runs import ROOT, run, train_arguments

pytestmark = [pytest.mark.gpu, pytest.mark.launch]


@pytest.mark.parametrize("precision", [[], ["--bf16"], ["--fp16"]], ids=["fp32", "bf16", "fp16"])
def test_the_main_job_runs_on_a_gpu(precision, demo_manifest, tmp_path):
    config = str(ROOT / "ds_configs" / "offload.json")
    # DeepSpeed's forgets CUDA_VISIBLE_DEVICES where it is told how many GPUs to take, and knows them by number only.
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    named = ["deepspeed", "--include", f"localhost:{gpu}"]
    launcher = named if gpu.isdigit() else ["torchrun", "--nproc_per_node", "1"]
    command = [*launcher, "launch/train.py", "--deepspeed", config, *precision]
    printed = run([*command, *train_arguments(demo_manifest, tmp_path / "run")])
    assert "one process, cuda" in printed
    losses = [entry["train_loss"] for entry in json.loads((tmp_path / "run/history.json").read_text())]
    assert all(0 < loss < 10 for loss in losses)
