"""Tables of runs: what is pooled, what is told apart, and what is left out."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import evaluate, train, write_cohort

from ds_wsi.bags.features import write_features
from ds_wsi.cli import main
from ds_wsi.evaluation.protocol import EvaluationProtocol
from ds_wsi.evaluation.record import RunRecord

RECORD = RunRecord("cohort", "resnet18", "abmil", "frozen", 0, "", "test", EvaluationProtocol(), {"optim.seedless": 1})


def write_run(folder, record=RECORD, classes=("a", "b"), value=0.5, chance=0.75):
    folder.mkdir(parents=True)
    names = ("auc", "accuracy", "quadratic_weighted_kappa", "balanced_accuracy", "f1")
    metrics = {name: {"value": value, "low": 0, "high": 1} for name in names}
    evaluation = {"tiles": None, "runs": 1, "seed": 0}
    (folder / "metrics.json").write_text(json.dumps({"evaluation": evaluation, "metrics": metrics}))
    lines = ["slide_id,patient_id,label,predicted,n_tiles," + ",".join(f"probability_{name}" for name in classes)]
    lines += [f"s{number},p{number},a,a,5,{chance},{1 - chance}" for number in range(3)]
    (folder / "predictions.csv").write_text("\n".join(lines) + "\n")
    record.write(folder)
    return str(folder)


def report(tmp_path, runs, *more):
    status = main(["report", *runs, "--output_dir", str(tmp_path / "tables"), *more])
    table = tmp_path / "tables" / "results.md"
    return status, table.read_text() if table.is_file() else ""


def test_a_runs_own_evaluation_is_left_out_and_the_rest_written(tmp_path, capsys):
    write_cohort(tmp_path)
    assert train(tmp_path, tmp_path / "frozen", "--seed", 1) == 0
    capsys.readouterr()
    assert evaluate(tmp_path, tmp_path / "frozen", tmp_path / "again") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("test metrics of 2 slides:\nmetric")
    assert f"written: {tmp_path / 'again' / 'report.html'}" in printed.err
    status, text = report(tmp_path, [str(tmp_path / "frozen"), str(tmp_path / "again")])
    assert status == 0
    assert "| 1 |\n" in text
    assert f"again: the same model on the same slides as {tmp_path / 'frozen'}" in text.replace("\\", "")
    assert f"written: {tmp_path / 'tables' / 'results.csv'}" in capsys.readouterr().err


def test_other_predictions_of_one_seed_and_split_are_refused_with_a_remedy_that_is_there(tmp_path, capsys):
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", chance=0.8)]
    assert report(tmp_path, runs)[0] == 2
    assert "HINT: leave one of them out; runs of other splits are told apart where they are trained" in (
        capsys.readouterr().err
    )


def test_runs_whose_classes_come_in_another_order_are_not_pooled(tmp_path):
    runs = [
        write_run(tmp_path / "one", value=0.2),
        write_run(tmp_path / "two", replace(RECORD, seed=1), classes=("b", "a"), value=0.8),
    ]
    _, text = report(tmp_path, runs)
    assert "classes a, b | 20.00" in text
    assert "classes b, a | **80.00**" in text


def test_variants_are_named_by_options_and_the_metric_that_chose_comes_first(tmp_path):
    runs = []
    for number, (name, value) in enumerate((("optim.num_train_epochs", 1), ("slides_per_step", 4), ("augment.hue", 1))):
        settings = {"metric_for_best_model": "f1", name: value}
        runs.append(write_run(tmp_path / str(number), replace(RECORD, settings=settings)))
    _, text = report(tmp_path, runs)
    for words in ("num_train_epochs 1", "bags_per_step 4", "augment_hue 1"):
        assert words in text
    assert "optim." not in text
    header = next(line for line in text.splitlines() if line.startswith("| Method"))
    assert [cell.split()[0] for cell in header.split("|")[3:7]] == ["F1", "AUC", "Accuracy", "QWK"]
    _, text = report(tmp_path, runs, "--metric", "AUC")
    assert "F1" not in text


@pytest.mark.parametrize("of_ours", [True, False])
def test_features_are_named_by_the_encoder_that_made_them(tmp_path, of_ours):
    write_cohort(tmp_path)
    if of_ours:
        for path in (tmp_path / "features").glob("*"):
            features = torch.randn(6, 8)
            about = {"encoder": "resnet18 with weights 0a1b2c3d"}
            write_features(path, features, torch.arange(12).reshape(6, 2), 64.0, about)
    assert train(tmp_path, tmp_path / "run", epochs=1) == 0
    record = RunRecord.read(tmp_path / "run")
    if of_ours:
        assert record.method == "features of resnet18 + abmil"
        assert record.settings["features"] == "resnet18 with weights 0a1b2c3d"
        assert "abmil on features of resnet18, width 8" in (tmp_path / "run" / "report.html").read_text()
        save_file({"features": torch.randn(5, 8)}, tmp_path / "features" / "s00.safetensors")
        assert train(tmp_path, tmp_path / "mixed", epochs=1) == 0
        record = RunRecord.read(tmp_path / "mixed")
    assert record.method == "features features + abmil", "files of which one does not tell its encoder: their folder"
