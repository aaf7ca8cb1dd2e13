"""`launch/gpu_day.sh` with other programs in the places of its own: which GPU its DeepSpeed part takes."""

import os
import subprocess

import pytest

from runs import ROOT

SCRIPT = ROOT / "launch" / "gpu_day.sh"


@pytest.mark.parametrize(
    ("visible", "launcher"),
    [
        (None, "deepspeed --include localhost:0"),
        ("1", "deepspeed --include localhost:1"),
        ("3,1", "deepspeed --include localhost:3"),
        ("GPU-8f6a", "torchrun --nproc_per_node 1"),
    ],
)
def test_the_deepspeed_part_trains_on_the_first_visible_gpu(visible, launcher, tmp_path, monkeypatch):
    """DeepSpeed's launcher takes GPU 0 whatever is visible, where it is told a number of GPUs."""
    for name in ("python", "deepspeed", "torchrun"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} $*\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    marks = tmp_path / "marks"
    command = ["bash", str(SCRIPT), "--only", "train_deepspeed", "--output_dir", str(marks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    called = (marks / "train_deepspeed.log").read_text()
    assert called.startswith(f"{launcher} launch/train.py --deepspeed ds_configs/papers.json")
