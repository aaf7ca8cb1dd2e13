"""The main job on a CUDA device."""

import json

import pytest

from runs import ROOT, run, train_arguments

pytestmark = [pytest.mark.gpu, pytest.mark.launch]


@pytest.mark.parametrize("precision", [[], ["--bf16"], ["--fp16"]], ids=["fp32", "bf16", "fp16"])
def test_the_main_job_runs_on_a_gpu(precision, demo_manifest, tmp_path):
    config = str(ROOT / "ds_configs" / "offload.json")
    command = ["deepspeed", "--num_gpus", "1", "launch/train.py", "--deepspeed", config, *precision]
    printed = run([*command, *train_arguments(demo_manifest, tmp_path / "run")])
    assert "one process, cuda" in printed
    losses = [entry["train_loss"] for entry in json.loads((tmp_path / "run/history.json").read_text())]
    assert all(0 < loss < 10 for loss in losses)
