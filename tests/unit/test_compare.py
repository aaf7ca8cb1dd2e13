import json
import math
import statistics
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest

from ds_wsi.cli import build_parser, main
from ds_wsi.evaluation.record import RunRecord
from ds_wsi.training import compare
from ds_wsi.training.compare import ComparedRun, compared_runs, format_table
from ds_wsi.training.options import settings_from
from ds_wsi.training.settings import OptimSettings
from launch.benchmarks import protocol
from launch.benchmarks.table import Bound, write_result


@pytest.fixture
def commands(monkeypatch):
    """The trainings' commands, which leave what a training leaves."""
    runs = []

    def train(command, check):
        assert check
        settings, _ = settings_from(build_parser().parse_args(command[3:]))
        runs.append(settings)
        folder = compare.Path(settings.run.output_dir)
        folder.mkdir(parents=True)
        value = 0.5 + 0.1 * settings.run.seed + (0.0 if settings.model.freeze_encoder else 0.25)
        metrics = {name: {"value": value, "low": 0, "high": 1} for name in compare.METRICS}
        (folder / "metrics.json").write_text(
            json.dumps({"metrics": metrics, "evaluation": {"tiles": None, "runs": 1, "seed": 0}})
        )
        rows = [f"{name},{name},{name},3,{value},{1 - value}" for name in ("normal", "tumor")]
        head = "slide_id,patient_id,label,n_tiles,probability_normal,probability_tumor"
        (folder / "predictions.csv").write_text("\n".join([head, *rows, ""]))
        if settings.model.aggregator != "mean":  # else it died before its end
            (folder / "run.json").write_text("{}")
        return subprocess.CompletedProcess(command, 0)

    def read(folder):
        if not (folder / "run.json").exists():
            raise compare.RunFolderError("unfinished")

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=train))  # others ask the system by processes too
    monkeypatch.setattr(RunRecord, "read", read)
    monkeypatch.setattr("ds_wsi.commands.demo.make_demo", lambda folder, policy: folder)
    return runs


def test_one_command_trains_every_aggregator_seed_and_kind_once(commands, tmp_path, capsys):
    given = ["demo", "--compare", "abmil,dtfd", "--seeds", "2", "--seed", "1", "--demo_dir", "slides"]
    assert main([*given, "--output_dir", str(tmp_path)]) == 0
    trained = [(run.model.aggregator, run.model.freeze_encoder, run.run.seed) for run in commands]
    assert sorted(trained) == sorted(
        (name, frozen, seed) for name in ("abmil", "dtfd") for frozen in (0, 1) for seed in (1, 2)
    )
    assert {run.data.demo_dir for run in commands} == {"slides"}
    assert {run.run.resume_from_checkpoint for run in commands} == {"latest"}
    printed = capsys.readouterr().out
    assert "| abmil | auc | 65.00 ± 7.07 | 90.00 ± 7.07 | +25.00 ± 0.00 |" in printed
    losses = [[-500 * math.log(value * (1 - value)) for value in values] for values in ((0.6, 0.7), (0.85, 0.95))]
    frozen, trained, gains = (
        f"{statistics.fmean(one):{sign}.2f} ± {statistics.stdev(one):.2f}"
        for one, sign in zip((*losses, [b - a for a, b in zip(*losses, strict=True)]), ("", "", "+"), strict=True)
    )
    assert f"| abmil | log loss | {frozen} | {trained} | {gains} |" in printed
    assert (tmp_path / "compare.md").read_text() in printed
    assert main([*given, "--output_dir", str(tmp_path)]) == 0
    assert len(commands) == 8, "what is finished is not trained again"
    capsys.readouterr()
    assert main([*given, "--demo", "stains", "--output_dir", str(tmp_path)]) == 2
    assert "a finished run must be of the same options and weights" in capsys.readouterr().err
    assert len(commands) == 8


def test_both_arms_are_trained_alike_but_for_the_encoder(commands, tmp_path):
    assert main(["demo", "--compare", "abmil,transmil", "--output_dir", str(tmp_path)]) == 0
    for frozen, trained in (commands[:2], commands[2:]):
        assert (frozen.model.freeze_encoder, trained.model.freeze_encoder) == (True, False)
        assert replace(frozen, model=trained.model, run=trained.run) == trained
    rates = {run.model.aggregator: run.optim.learning_rate for run in commands}
    assert rates == {"abmil": OptimSettings().learning_rate, "transmil": 1e-4}


def test_without_a_value_the_default_aggregator_and_one_seed(commands, tmp_path, capsys):
    assert main(["demo", "--compare", "--output_dir", str(tmp_path)]) == 0
    assert [(run.model.aggregator, run.run.seed) for run in commands] == [("gated_abmil", 0)] * 2
    assert "| gated_abmil | accuracy | 50.00 | 75.00 | +25.00 |" in capsys.readouterr().out


def test_from_weights_both_arms_have_them_and_the_trainers_own_settings(commands, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ds_wsi.models.packaged.write_packaged_weights", lambda path: path)
    given = ["demo", "--demo", "stains", "--demo_dir", "slides", "--compare", "--pretrained"]
    assert main([*given, "--output_dir", str(tmp_path)]) == 0
    frozen, trained = commands
    assert replace(frozen, model=trained.model, run=trained.run) == trained
    assert trained.model == replace(frozen.model, freeze_encoder=False)
    assert (trained.data.demo, trained.model.encoder) == ("stains", "tf_efficientnet_lite0")
    assert trained.model.encoder_weights == "slides/efficientnet_lite0.safetensors"
    assert trained.optim == OptimSettings()
    assert "demo cohort stains, test split" in capsys.readouterr().out
    assert main(["demo", "--pretrained", "--demo_dir", "slides"]) == 2
    assert "--pretrained must be given with --compare" in capsys.readouterr().err


def test_differences_are_paired_by_seed():
    runs = compared_runs(["abmil"], range(2))
    values = {("frozen", 0): 0.2, ("frozen", 1): 0.6, ("end_to_end", 0): 0.5, ("end_to_end", 1): 0.7}
    table = format_table({run: dict.fromkeys(compare.METRICS, values[run.arm, run.seed]) for run in runs})
    assert "| abmil | auc | 40.00 ± 28.28 | 60.00 ± 14.14 | +20.00 ± 14.14 |" in table


def test_runs_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"--compare must be of .*, got 'meen'"):
        compared_runs(["meen"], range(1))
    with pytest.raises(ValueError, match=r"must name an aggregator once"):
        compared_runs(["abmil", "abmil"], range(1))
    with pytest.raises(ValueError, match=r"--seeds must be at least 1, got 0"):
        compared_runs(["abmil"], range(0))
    assert ComparedRun("abmil", "frozen", 3).name == "abmil_frozen_seed3"


def test_the_benchmark_holds_that_both_metrics_gain(commands, tmp_path):
    options = {"aggregators": "abmil,dtfd", "seeds": "2", "runs": str(tmp_path / "runs"), "demo_dir": "slides"}
    result = protocol.measure(quick=False, slides=(), options=options)
    assert len(result.rows) == len(commands) == 8
    assert [bound.measured for bound in result.bounds] == pytest.approx([0.25] * 4)
    assert all(bound.holds for bound in result.bounds)
    write_result("protocol", result, tmp_path)
    assert (tmp_path / "protocol.png").stat().st_size > 1000
    assert not Bound("nothing gained", 0.0, 1e-9).holds
    with pytest.raises(ValueError, match=r"--option must be one of aggregators, seeds, runs, demo_dir, got 'seed'"):
        protocol.measure(quick=True, slides=(), options={"seed": "1"})
    write_result("gone", replace(result, rows=[{"seconds": float("nan")}]), tmp_path)
    assert json.loads((tmp_path / "gone.json").read_text())["rows"] == [{"seconds": None}]
