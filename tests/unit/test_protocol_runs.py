"""Protocols in this process, through launch/train_custom.py: what is skipped, resumed, repeated, refused."""

import csv
import gc
import json
import runpy
import shutil
import sys

import pytest

from ds_wsi.cli import main
from ds_wsi.models import SlideModel
from ds_wsi.runtime.log import logger
from ds_wsi.training import loop, protocol
from ds_wsi.training.protocol import PlannedRun, Protocol, plan_runs, split_cohort
from ds_wsi.training.run_mark import mark_started, require_same
from miniatures import custom, draw, table
from runs import ROOT

SEED_0, SEED_1 = "official_seed0", "official_seed1"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight slides of which two validate and two test, as the table's column says."""
    root = draw(custom(tmp_path_factory.mktemp("custom")))
    splits = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    rows = [(f"case_{number}", ("wt", "mutant")[number % 2], split) for number, split in enumerate(splits)]
    table(root / "labels.csv", ("slide_id", "label", "part"), rows)
    return root


def arguments(data, output_dir, *more):
    options = ["--data_dir", data, "--split_column", "part", "--output_dir", output_dir, "--tile_size_px", "32"]
    options += ["--encoder", "resnet10t", "--num_train_epochs", "2", "--tiles_per_slide", "4", "--bags_per_step", "2"]
    return [str(option) for option in [*options, "--dataloader_num_workers", "0", "--dropout", "0.2", *more]]


def launch(monkeypatch, *given):
    """The script, as `python launch/train_custom.py` runs it; its exit status."""
    monkeypatch.setattr(sys, "argv", ["train_custom.py", *given])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "launch" / "train_custom.py"), run_name="__main__")
    return caught.value.code


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """Two seeds, one after the other in one process; what was printed."""
    output = tmp_path_factory.mktemp("protocol") / "out"
    before = list(logger.handlers), logger.propagate, logger.level
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert launch(monkeypatch, *arguments(data, output, "--seeds", "2")) == 0
    # Else the tests' own commands would write to this fixture's standard error.
    logger.handlers[:], logger.propagate, logger.level = before
    return output


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_a_protocol_leaves_its_runs_and_their_table(finished):
    text = (finished / "results.md").read_text()
    assert "| resnet10t + abmil |" in text
    assert "| 2 |" in text
    assert weights(finished / SEED_0) != weights(finished / SEED_1)
    for name, seed in ((SEED_0, 0), (SEED_1, 1)):
        record = json.loads((finished / name / "run.json").read_text())
        assert (record["dataset"], record["split"], record["seed"]) == ("custom", "official", seed)
    assert not [item for item in gc.get_objects() if type(item) is SlideModel], "a run's model was kept"


def test_the_second_run_is_the_run_alone_bit_by_bit(finished, data, tmp_path, monkeypatch):
    """Killed once: the other seed's run is begun, dies in its evaluation, and is gone on with from its checkpoint."""
    given = arguments(data, tmp_path / "alone", "--seed", "1", "--seeds", "1")
    finish = loop.finish

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "finish", die)
    with pytest.raises(KeyboardInterrupt):
        main(["protocol", "custom", *given])
    assert not (tmp_path / "alone" / "results.md").exists()
    steps = []
    train_step = loop.train_step
    monkeypatch.setattr(loop, "finish", finish)
    monkeypatch.setattr(loop, "train_step", lambda *args: steps.append(1) or train_step(*args))
    newest = max((tmp_path / "alone" / SEED_1).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert newest.name == "checkpoint-4"
    # As if it had been killed in the second epoch.
    for path in newest.iterdir():
        if path.is_file():
            path.unlink()
    assert main(["protocol", "custom", *given]) == 0
    assert len(steps) == 2
    for name in ("model.safetensors", "predictions.csv", "metrics.json"):
        alone, second = (folder / SEED_1 / name for folder in (tmp_path / "alone", finished))
        assert alone.read_bytes() == second.read_bytes(), name


def test_what_is_finished_is_skipped_and_other_settings_are_refused(finished, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(protocol, "train", lambda *_: pytest.fail("a finished run was trained again"))
    # How it is computed and kept may differ, and where its slides lie.
    moved = shutil.copytree(data, tmp_path / "moved")
    given = arguments(moved, finished, "--seeds", "2")
    assert main(["protocol", "custom", *given, "--save_steps", "1", "--dataloader_num_workers", "1"]) == 0
    printed = capsys.readouterr()
    assert f"{SEED_0}, is finished: skipped" in printed.err
    assert printed.out.strip() == (finished / "results.md").read_text().strip()
    assert main(["protocol", "custom", *given, "--learning_rate", "0.5"]) == 2
    assert "optim.learning_rate must be what the run was begun with, 5e-05, got 0.5" in capsys.readouterr().err


def test_another_label_file_is_another_protocol(finished, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(protocol, "train", lambda *_: pytest.fail("trained"))
    text = (data / "labels.csv").read_text()
    (tmp_path / "labels.csv").write_text(text.replace("case_0,wt", "case_0,mutant"))
    manifest = (finished / "manifests" / "official.csv").read_text()
    assert main(["protocol", "custom", *arguments(data, finished, "--labels", tmp_path / "labels.csv")]) == 2
    assert "slides, labels and splits must be what the run was begun with" in capsys.readouterr().err
    (finished / "manifests" / "official.csv").write_text(manifest)


def test_a_torn_result_is_made_again_and_a_foreign_folder_refused(finished, data, tmp_path, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(protocol, "train", lambda settings, _: trained.append(settings.run.output_dir))
    record = finished / SEED_1 / "predictions.csv"
    whole = record.read_text()
    record.write_text(whole[:-5])
    assert main(["protocol", "custom", *arguments(data, finished, "--seeds", "2")]) == 0
    assert trained == [str(finished / SEED_1)]
    record.write_text(whole)
    (tmp_path / "out" / SEED_0).mkdir(parents=True)
    (tmp_path / "out" / SEED_0 / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert main(["protocol", "custom", *arguments(data, tmp_path / "out")]) == 2
    assert "must be this protocol's, got a folder without protocol.json. HINT" in capsys.readouterr().err
    assert (tmp_path / "out" / SEED_0 / "notes.txt").read_text() == "mine"


def test_options_that_were_refused_can_be_corrected_until_there_is_something_to_go_on_with(tmp_path):
    mark_started(tmp_path, {"optim.class_weights": [1, 2, 3]})
    require_same(tmp_path, {"optim.class_weights": [1, 2]})
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(ValueError, match=r"optim.class_weights must be what the run was begun with, \[1, 2, 3\]"):
        require_same(tmp_path, {"optim.class_weights": [1, 2]})


def test_a_dry_run_tells_all_and_writes_nothing(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = arguments(data, tmp_path / "out", "--seeds", "2", "--tiles_dir", tmp_path / "tiles")
    assert main(["protocol", "custom", *given, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert f"2 runs, one after the other:\n  {SEED_0}, {SEED_1}\n" in printed
    assert "split official:\n  train: 4 slides of 4 patients (mutant 2, wt 2)" in printed
    assert "  * --num_train_epochs 2\n" in printed
    assert "steps: 2 per epoch, 4 in 2 epochs, 1 process\n" in printed
    assert "partition of" in printed
    assert "two micro-steps: 8 tiles read in" in printed  # all bags of a step: the norms average over it
    assert "time, an estimate from them: " in printed
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_one_training(demo_manifest, tmp_path, capsys):
    given = ["--manifest", str(demo_manifest), "--output_dir", str(tmp_path / "out"), "--tile_size_px", "64"]
    given += ["--encoder", "resnet10t", "--tiles_per_slide", "3", "--dataloader_num_workers", "0", "--freeze_encoder"]
    assert main(["train", *given, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("settings that differ from the defaults:\n  * --manifest ")
    assert f"  * --output_dir {tmp_path / 'out'}\n" in printed
    assert "--seed 0" not in printed
    assert "more (--dry_run all)" in printed
    assert "norms: BatchNorm averages over nothing: it takes running statistics in training" in printed
    assert "train: 4 slides of 2 patients (normal 2, tumor 2)" in printed
    assert "steps: 4 per epoch, 32 in 8 epochs" in printed
    assert "partition: none is needed" in printed
    assert "two micro-steps: 3 tiles read in" in printed
    assert main(["train", *given, "--dry_run", "all"]) == 0
    printed = capsys.readouterr().out
    assert "settings that are the defaults:\n" in printed
    assert "\n  --seed 0\n" in printed
    assert "bn_population" not in printed, "the norms' line tells it, as the run trains"
    assert main(["train", *given, "--dry_run", "--optim", "sgd", "--demon"]) == 2
    assert "--demon must be given with an optimizer that has betas" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_checks_folder_and_checkpoint_as_training_does(demo_manifest, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    refused = {
        ("--output_dir", "full"): "must be a new folder, an empty one or a run's own",
        ("--resume_from_checkpoint",): "without a path needs --output_dir",
        ("--resume_from_checkpoint", "none/checkpoint-4"): "must be a whole checkpoint",
        ("--output_dir", "new", "--resume_from_checkpoint", "none/checkpoint-4"): "must be a whole checkpoint",
    }
    for more, words in refused.items():
        given = ["train", "--manifest", str(demo_manifest), "--encoder", "resnet10t", *more]
        for dry in (["--dry_run"], []):
            assert main([*given, *dry]) == 2
            assert words in capsys.readouterr().err, (more, dry)


def test_problems_of_rows_are_listed_and_then_those_of_slides(data, tmp_path, capsys):
    bad = draw(custom(tmp_path / "bad"))
    (bad / "scans" / "case_3.svs").write_text("no slide")
    text = (data / "labels.csv").read_text()
    (bad / "labels.csv").write_text(text)
    assert main(["protocol", "custom", *arguments(bad, tmp_path / "out")]) == 2
    assert "in a format of OpenSlide's" in capsys.readouterr().err
    (bad / "labels.csv").write_text(text.replace("case_0,wt", "case_0,").replace("case_1,", "case_77,"))
    for more in ((), ("--dry_run",)):
        assert main(["protocol", "custom", *arguments(bad, tmp_path / "out", *more)]) == 2
        printed = capsys.readouterr().err
        assert "has 2 problems" in printed
        assert "label must be given, got none (slide case_0" in printed
        assert "image must be a file, got none of that name in the folder (slide case_77" in printed
        assert "OpenSlide" not in printed
    assert not (tmp_path / "out" / SEED_0).exists()


def test_a_trained_model_is_tested_on_an_external_set(finished, data, tmp_path, capsys):
    labels = (data / "labels.csv").read_text().replace(",wt,", ",0,").replace(",mutant,", ",1,")
    (tmp_path / "labels.csv").write_text(labels)
    given = ["evaluate", "--model", str(finished / SEED_0), "--output_dir", str(tmp_path / "out"), "--split", "all"]
    given += ["--dataset", "custom", "--data_dir", str(data), "--labels", str(tmp_path / "labels.csv")]
    given += ["--dataloader_num_workers", "0"]
    assert main(given) == 2
    assert "got 0, 1: the cohort's are 0, 1 (labels.csv" in capsys.readouterr().err
    assert main([*given, "--map_labels", "0=wt,1=mutant"]) == 0
    with (
        (tmp_path / "out" / "predictions.csv").open() as external_file,
        (finished / SEED_0 / "predictions.csv").open() as run_file,
    ):
        rows, run_rows = list(csv.DictReader(external_file)), list(csv.DictReader(run_file))
    assert [row["label"] for row in rows] == ["wt", "mutant"] * 4
    assert rows[6:] == run_rows, "the same slides, whatever their labels are called there"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "one of --manifest and --dataset must be given"),
        (("--manifest", "m.csv", "--dataset", "custom"), "one of --manifest and --dataset must be given"),
        (("--dataset", "custom"), "--data_dir must be given with --dataset"),
        (("--dataset", "custom", "--data_dir", ".", "--classes", "a,b"), "--classes must not be given with --dataset"),
        (("--manifest", "m.csv", "--target", "tumor"), "--target must come with --dataset"),
    ],
)
def test_an_external_set_is_named_one_way(given, message, tmp_path, capsys):
    assert main(["evaluate", "--model", str(tmp_path), "--output_dir", str(tmp_path / "out"), *given]) == 2
    assert message in capsys.readouterr().err


def test_every_pair_of_split_and_seed_is_a_run():
    plan = Protocol("panda", "data", {}, {"folds": 2}, (3, 4), "panda_cosine")
    runs = plan_runs(plan, ("fold0", "fold1"))
    assert [run.name for run in runs] == ["fold0_seed3", "fold0_seed4", "fold1_seed3", "fold1_seed4"]
    assert runs[0] == PlannedRun("fold0", 3)


def test_splits_are_named_by_how_they_were_made(data, caplog):
    from ds_wsi.bags.cohort import tile_manifest
    from ds_wsi.bags.datasets import read_custom
    from ds_wsi.slides.policy import TilingPolicy

    cohort = tile_manifest(read_custom(data), TilingPolicy(tile_size_px=32, use_saturation=False))

    def names(**splitting):
        return list(split_cohort(Protocol("custom", "x", {}, splitting, (0,), "custom"), cohort))

    assert names(folds=3) == ["fold0", "fold1", "fold2"]
    with caplog.at_level("WARNING", "ds_wsi"):
        assert names(folds=2, level="slide") == ["fold0", "fold1"]
    with pytest.raises(ValueError, match=r"a split must be given, .* has none of its own. HINT: --split_file"):
        names()
    whole = split_cohort(Protocol("custom", "x", {}, {"folds": 2}, (0,), "custom"), cohort)["fold0"]
    assert [grid.slide_id for grid in whole.grids] == [slide.slide_id for slide in whole.manifest.slides]
