"""The same script under each launcher, as a user types it."""

import csv
import json

import pytest
import torch

from ds_wsi.cli import main
from ds_wsi.evaluation.protocol import EvaluationProtocol
from ds_wsi.evaluation.record import RunRecord
from ds_wsi.evaluation.tables import write_tables
from ds_wsi.models import load_model
from runs import ROOT, run, train_arguments

pytestmark = pytest.mark.launch
OFFLOAD = str(ROOT / "ds_configs" / "offload.json")
SCRIPT = "launch/train.py"
ACCELERATE = "accelerate launch --use_deepspeed --num_processes 2 --num_machines 1 --mixed_precision no --zero_stage 3"
LAUNCHERS = {
    # In two processes: tests/launch/test_comm_hook.py. BatchNorm under DeepSpeed's half precision.
    "deepspeed, bf16": (
        ["deepspeed", SCRIPT, "--deepspeed", OFFLOAD, "--bf16"],
        "one process, CPU, bf16 mixed precision",
    ),
    "accelerate launch": (
        # Stacks of unequal bags, and a loss that needs labels.
        [*ACCELERATE.split(), SCRIPT, "--bags_per_step", "3", "--aggregator", "clam_sb"],
        "DeepSpeed ZeRO stage 3, optimizer offload none, 2 pr",
    ),
    "torchrun": (
        ["torchrun", "--standalone", "--nproc_per_node", "2", SCRIPT, "--eval_tiles", "5", "--eval_runs", "3"],
        "DDP (gloo), 2 processes, CPU, float32",
    ),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_main_job_runs_and_leaves_its_results(launcher, demo_manifest, tmp_path):
    command, engine = LAUNCHERS[launcher]
    printed = run([*command, *train_arguments(demo_manifest, tmp_path / "run")])
    assert engine in printed
    folder = tmp_path / "run"
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    assert set(metrics) == {"accuracy", "balanced_accuracy", "auc", "quadratic_weighted_kappa", "f1"}
    assert {"value", "low", "high"} <= set(metrics["auc"])
    with (folder / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["slide_id"] for row in rows] == ["demo_006", "demo_007"]
    record = RunRecord.read(folder)
    assert (record.dataset, record.training, record.seed) == (demo_manifest.stem, "end to end", 0)
    assert record.evaluation == EvaluationProtocol(*((5, 3) if launcher == "torchrun" else ()))
    assert ({row["n_tiles"] for row in rows} == {"5"}) == (launcher == "torchrun")
    for name in ("curves.png", "heatmaps/demo_006.png", "heatmaps/demo_007.png", "report.html"):
        assert (folder / name).stat().st_size > 1000, name
    assert list(folder.glob("tensorboard/**/events*"))
    model, config = load_model(folder)
    assert config.classes == ("normal", "tumor")
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_two_processes_that_share_each_slide_train_as_one(demo_manifest, tmp_path):
    """The same tiles, weights and losses; ZeRO-2 with offload, partitioned, train-mode BatchNorm over the whole bag."""
    sampled = ["--tiles_per_slide", "9", "--augment_colour", "0", "--gradient_accumulation_steps", "2"]
    sampled += ["--norm_training", "bag", "--norm_evaluation", "running"]
    run(["python", SCRIPT, *train_arguments(demo_manifest, tmp_path / "one", *sampled)])
    shared = ["--tile_parallel_size", "2", "--partition", "lean", "--partition_chunk_size", "3"]
    command = ["deepspeed", "--num_gpus", "2", SCRIPT, "--deepspeed", OFFLOAD]
    printed = run([*command, *train_arguments(demo_manifest, tmp_path / "two", *sampled, *shared)])
    assert "2 ranks share each bag, sharded exchange" in printed
    runs = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two")]
    for one, two in zip(*runs, strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-6)
        assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
    weights = [load_model(tmp_path / name)[0].state_dict() for name in ("one", "two")]
    moved = sum((weights[0][name] - value).abs().float().sum() for name, value in weights[1].items())
    assert moved < 1e-6 * sum(value.abs().float().sum() for value in weights[0].values())


def test_mistakes_are_one_message_without_a_traceback(demo_manifest, tmp_path):
    text = demo_manifest.read_text().replace("demo_001,", "demo_000,", 1).replace("slides/demo_002.tiff", "gone.tiff")
    broken = demo_manifest.parent / "broken.csv"
    broken.write_text(text)
    with pytest.raises(AssertionError) as caught:
        run(["python", SCRIPT, *train_arguments(broken, tmp_path / "run")])
    printed = str(caught.value)
    assert "exited with 2" in printed
    assert "2 problems" in printed
    assert "slide_id must be unique, got 'demo_000' in rows 2 and 3" in printed
    assert "gone.tiff" in printed
    assert "Traceback" not in printed


def test_evaluate_and_heatmap_read_a_finished_run(demo_manifest, tmp_path):
    folder = tmp_path / "run"
    assert "engine: plain PyTorch, one process, CPU" in run(["python", SCRIPT, *train_arguments(demo_manifest, folder)])
    chosen = ["--model", str(folder), "--manifest", str(demo_manifest)]
    evaluate = ["deepspeed", "--num_gpus", "2", "launch/evaluate.py", *chosen]
    printed = run([*evaluate, "--output-dir", str(tmp_path / "evaluated")])
    assert printed.count("test metrics of") == 1
    # The same slides, tiles and weights, shared by two processes: the same predictions, to the last digit.
    assert (tmp_path / "evaluated/predictions.csv").read_text() == (folder / "predictions.csv").read_text()
    sampled = ["--eval_tiles", "5", "--eval_runs", "3", "--device", "cpu"]
    assert main(["evaluate", *chosen, "--output_dir", str(tmp_path / "sampled"), *sampled]) == 0
    table = write_tables([folder, tmp_path / "sampled", tmp_path / "nothing"], tmp_path / "tables")
    assert "| 5 random tiles, 3 runs |" in table
    assert "| all tiles |" in table
    assert "nothing: no such folder" in table
    printed = run(["ds-wsi", "heatmap", *chosen, "--output_dir", str(tmp_path / "maps"), "--slide_ids", "demo_001"])
    assert "demo_001.png" in printed
    assert (tmp_path / "maps/demo_001.png").stat().st_size > 1000
