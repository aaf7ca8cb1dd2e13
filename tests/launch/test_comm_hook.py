"""The main job with compressed communication, in two processes."""

import json

import pytest

from runs import ROOT, run, train_arguments

pytestmark = pytest.mark.launch
SCRIPT = "launch/train.py"
OFFLOAD = str(ROOT / "ds_configs" / "offload.json")


def test_topk_under_deepspeed_counts_its_bytes_and_resumes(demo_manifest, tmp_path):
    folder = tmp_path / "run"
    command = ["deepspeed", "--num_gpus", "2", SCRIPT, "--deepspeed", OFFLOAD]
    options = train_arguments(demo_manifest, folder, "--comm_hook", "topk", "--comm_keep", "0.01")
    printed = run([*command, *options])
    assert "DeepSpeed ZeRO stage 2, optimizer offload cpu, 2 pr" in printed
    assert "communication hook: topk under zero2" in printed
    history = json.loads((folder / "history.json").read_text())
    ratios = [entry["comm/push_message_ratio"] for entry in history]
    assert 0.005 < ratios[-1] < 0.021, "8 bytes at most instead of 4 for one entry in a hundred"
    assert history[1]["comm/push_wire_bytes"] > history[0]["comm/push_wire_bytes"] > 0
    assert "topk hook under zero2" in (folder / "report.html").read_text()
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert [path.name for path in sorted(newest.glob("comm_hook-*"))] == [
        "comm_hook-00000-of-00002.safetensors",
        "comm_hook-00001-of-00002.safetensors",
    ]
    printed = run([*command, *options, "--resume_from_checkpoint"])
    assert "resumed from" in printed
