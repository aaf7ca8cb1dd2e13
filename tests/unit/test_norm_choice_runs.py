"""How the norms of a run are evaluated: measured, exported, followed by other commands."""

import argparse
import json
from dataclasses import replace

import pytest
import torch
from norm_models import ALL, TILE_PX, make_model
from safetensors.torch import load_file as read_file

from ds_wsi.bags.bag import FailureLog
from ds_wsi.bags.cohort import load_cohort
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.cli import main
from ds_wsi.commands.predicting import tell_old_norms
from ds_wsi.evaluation.norm_choice import NormGap
from ds_wsi.models import ModelConfig, load_model
from ds_wsi.models.config import NEW_IN
from ds_wsi.slides.policy import TilingPolicy


@pytest.fixture(scope="module")
def cohort(demo_manifest):
    return load_cohort(demo_manifest, TilingPolicy(tile_size_px=TILE_PX))


@pytest.fixture(scope="module")
def run(demo_manifest, tmp_path_factory):
    folder = tmp_path_factory.mktemp("norms")
    options = [
        "train",
        "--manifest",
        str(demo_manifest),
        "--tiles_dir",
        str(folder / "tiles"),
        "--encoder",
        "resnet10t",
    ]
    options += ["--tile_size_px", "64", "--num_train_epochs", "2", "--dataloader_num_workers", "0"]
    assert main([*options, "--output_dir", str(folder / "run"), "--norm_training", "bag"]) == 0
    return folder, options


def test_a_run_keeps_what_was_measured_and_exports_what_was_best(run, demo_manifest):
    folder = run[0] / "run"
    norms = json.loads((folder / "metrics.json").read_text())["norms"]
    config = ModelConfig.read(folder / "config.json")
    assert (norms["training"], norms["measured_on"]) == ("bag", "validation")
    assert set(norms["candidates"]) == set(ALL)
    assert (config.norm_training, config.norm_evaluation) == ("bag", norms["evaluation"])
    assert norms["evaluation"] == max(
        ALL, key=lambda name: (norms["candidates"][name]["auc"], -norms["candidates"][name]["loss"])
    )
    assert set(norms["gap"]) == {"trained_loss", "exported_loss", "is_wide"}
    assert "BatchNorm averages over each bag" in (folder / "report.html").read_text()
    model, _ = load_model(folder)
    assert model.norm_evaluation == norms["evaluation"]
    entries = json.loads((folder / "history.json").read_text())
    chosen = entries[-1]["norm_evaluation"]
    assert entries[-1]["eval_loss"] == entries[-1][f"norm_{chosen}_loss"]
    out = folder.parent / "again"
    given = ["evaluate", "--model", str(folder), "--manifest", str(demo_manifest), "--output_dir", str(out)]
    assert main([*given, "--dataloader_num_workers", "0"]) == 0
    assert (out / "predictions.csv").read_text() == (folder / "predictions.csv").read_text()


@pytest.mark.slow
def test_accumulation_over_a_step_is_a_stack_of_its_bags(run, monkeypatch):
    """Two micro-steps of one slide are one call of two: the same losses as with two slides per micro-step."""
    folder, options = run
    losses = {}
    for name, how in (
        ("micro", ["--gradient_accumulation_steps", "2"]),
        ("stack", ["--per_device_train_batch_size", "2"]),
    ):
        assert main([*options, *how, "--norm_training", "step", "--output_dir", str(folder / name)]) == 0
        history = json.loads((folder / name / "history.json").read_text())
        losses[name] = [entry[key] for entry in history for key in ("train_loss", "eval_loss", "norm_bag_loss")]
    assert losses["micro"] == pytest.approx(losses["stack"], rel=1e-4)


@pytest.fixture(scope="module")
def old(run):
    """The run's model, as a version exported it that knew nothing of its norms."""
    folder, directory = run[0] / "run", run[0] / "old"
    directory.mkdir(exist_ok=True)
    values = json.loads((folder / "config.json").read_text())
    of_norms = {name for values_of in (NEW_IN[version] for version in NEW_IN if version > 3) for name in values_of}
    values = {name: value for name, value in values.items() if name not in of_norms} | {"version": 3}
    (directory / "config.json").write_text(json.dumps(values))
    (directory / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return directory


def given_to(command, old, manifest, out):
    given = [command, "--model", str(old), "--manifest", str(manifest), "--dataloader_num_workers", "0"]
    return [*given, "--output_dir", str(old.parent / out)]


def test_a_model_of_an_earlier_version_is_checked(run, old, demo_manifest, capsys, monkeypatch):
    monkeypatch.setattr("ds_wsi.evaluation.norm_choice.norm_gap", lambda *_: NormGap(0.1, 2.0))
    assert main(given_to("evaluate", old, demo_manifest, "old_out")) == 0
    told = capsys.readouterr().err
    assert "was exported by an earlier version" in told
    assert "HINT: --norm_evaluation bag" in told
    assert main([*given_to("evaluate", old, demo_manifest, "old_bag"), "--norm_evaluation", "bag"]) == 0
    assert "earlier version" not in capsys.readouterr().err
    left, right = ((run[0] / name / "predictions.csv").read_text() for name in ("old_out", "old_bag"))
    assert left != right


@pytest.mark.parametrize("command", ["evaluate", "heatmap", "features"])
def test_a_model_of_an_earlier_version_predicts_slides_without_labels(old, demo_manifest, tmp_path, capsys, command):
    """What cannot be measured there is said, and costs no prediction; features follow the option too."""
    rows = demo_manifest.read_text().splitlines()[:3]
    (tmp_path / "cohort.csv").write_text("\n".join(",".join(row.split(",")[:2]) for row in rows))
    assert rows[0].startswith("slide_id,path")
    text = (tmp_path / "cohort.csv").read_text().replace(",slides", f",{demo_manifest.parent}/slides")
    (tmp_path / "cohort.csv").write_text(text)
    given = [*given_to(command, old, tmp_path / "cohort.csv", f"unlabelled_{command}")]
    given += ["--split", "all"] if command == "evaluate" else []
    assert main(given) == 0
    told = capsys.readouterr().err
    assert "without labels nothing can be compared. HINT: ds-wsi evaluate" in told
    assert len(list((old.parent / f"unlabelled_{command}").iterdir())) > 1
    given[-1 if command != "evaluate" else -3] += "_bag"
    assert main([*given, "--norm_evaluation", "bag"]) == 0
    assert "earlier version" not in capsys.readouterr().err
    if command == "features":
        plain, bag = (
            read_file(next((old.parent / f"unlabelled_features{word}").glob("*.safetensors"))) for word in ("", "_bag")
        )
        assert not torch.allclose(plain["features"], bag["features"])


def test_the_slides_without_a_label_are_no_part_of_the_check(cohort):
    """The first slides of the table have none; those that have one are compared."""
    model = make_model()
    slides = [
        replace(entry, label=None if row < 3 else entry.label) for row, entry in enumerate(cohort.manifest.slides)
    ]
    some = replace(cohort, manifest=replace(cohort.manifest, slides=tuple(slides)))
    measured = []

    def gap(*given):
        measured.extend(part.slide for part in given[5].gap)
        return NormGap(0.1, 0.1)

    options = argparse.Namespace(norm_evaluation=None, model="old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ds_wsi.evaluation.norm_choice.norm_gap", gap)
        patch.setattr("ds_wsi.models.config.stored_version", lambda _: 3)
        tell_old_norms(options, model, some, ReadPolicy(0), FailureLog(some.manifest.slides, some.grids, 0.0))
    assert measured == list(range(3, min(11, len(slides))))


@pytest.mark.parametrize("how", ["between", "beside"])
def test_epochs_in_which_the_encoder_rests_have_no_gap(run, how):
    """Exported as trained there, with running statistics; afterwards each bag's own were trained."""
    folder, options = run[0] / f"rest_{how}", run[1]
    given = [
        "--freeze_until",
        "layer2",
        "--freeze_encoder_epochs",
        "1",
        "--norm_training",
        "bag",
        "--norm_evaluation",
        "running",
    ]
    given += ["--validate_beside"] if how == "beside" else []
    assert main([*options, *given, "--output_dir", str(folder)]) == 0
    first, second = json.loads((folder / "history.json").read_text())
    assert first["norm_trained_loss"] == first["norm_exported_loss"]
    assert second["norm_trained_loss"] != pytest.approx(second["norm_exported_loss"], rel=1e-5)
    fixed = ModelConfig.read(folder / "config.json").fixed_norms
    assert {name.split(".")[0] for name in fixed} == {"conv1", "bn1", "layer1"}


def test_a_run_of_frozen_norms_tells_an_evaluation_that_was_not_trained(run):
    folder = run[0] / "frozen_bag"
    given = ["--norm_training", "frozen", "--norm_evaluation", "bag", "--output_dir", str(folder)]
    assert main([*run[1], *given]) == 0
    norms = json.loads((folder / "metrics.json").read_text())["norms"]
    assert (norms["training"], norms["evaluation"]) == ("frozen", "bag")
    assert norms["gap"]["trained_loss"] != pytest.approx(norms["gap"]["exported_loss"], rel=1e-3)
    assert "norm_bag_loss" in json.loads((folder / "history.json").read_text())[-1]


@pytest.mark.parametrize(("training", "warned"), [("stack", True), ("step", False)])
def test_few_slides_are_told_of_the_population_that_is_trained(run, capsys, training, warned):
    """Eight micro-steps of one slide: a step has eight, a stack one."""
    given = ["--norm_training", training, "--gradient_accumulation_steps", "8", "--dry_run"]
    assert main([*run[1], *given, "--output_dir", str(run[0] / "dry")]) == 0
    assert (
        f"norm.training {training}: the encoder's BatchNorm averages over 1 slide" in capsys.readouterr().err
    ) == warned
