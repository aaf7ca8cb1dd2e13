"""Where an evaluation may write, which slides it is on, and what it says of slides that the run knows."""

import json

import pytest
from safetensors.torch import load_file, save_file
from tiny_runs import evaluate, listing, rows_of, train, write_cohort, write_table

from ds_wsi.evaluation.record import RunRecord


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A cohort without splits, and a run that drew them."""
    folder = write_cohort(tmp_path_factory.mktemp("cohort"))
    write_table(folder / "m.csv", [row[:2] for row in rows_of()], ("slide_id", "label"))
    assert train(folder, folder / "run", epochs=1) == 0
    return folder


def test_the_runs_own_folder_is_refused_and_stays_as_it_is(cohort, capsys):
    before = listing(cohort / "run")
    for split in ("all", "test"):
        assert evaluate(cohort, cohort / "run", cohort / "run", "--split", split) == 2
        assert "must not be the folder of a run" in capsys.readouterr().err
    assert listing(cohort / "run") == before


def test_a_misspelt_manifest_or_model_leaves_an_earlier_evaluation_whole(cohort, tmp_path):
    output = tmp_path / "e"
    assert evaluate(cohort, cohort / "run", output) == 0
    before = listing(output)
    assert evaluate(cohort, cohort / "run", output, "--manifest", str(cohort / "none.csv")) == 2
    assert evaluate(cohort, cohort / "none", output) == 2
    assert listing(output) == before
    RunRecord.read(output)


def test_the_same_evaluation_may_be_made_again_and_another_is_refused(cohort, tmp_path, capsys):
    output = tmp_path / "e"
    assert evaluate(cohort, cohort / "run", output) == 0
    metrics = (output / "metrics.json").read_bytes()
    assert evaluate(cohort, cohort / "run", output) == 0
    assert (output / "metrics.json").read_bytes() == metrics
    before = listing(output)
    write_table(tmp_path / "other.csv", [(*row[:2],) for row in rows_of()[2:]], ("slide_id", "label"))
    for name, more in {
        "split test, now all": ("--split", "all"),
        "evaluation": ("--eval_tiles", "3"),
        "manifest_sha256": ("--manifest", str(tmp_path / "other.csv")),
    }.items():
        capsys.readouterr()
        assert evaluate(cohort, cohort / "run", output, *more) == 2
        assert name in capsys.readouterr().err
    assert train(cohort, tmp_path / "run2", "--seed", "1", epochs=1) == 0
    assert evaluate(cohort, tmp_path / "run2", output) == 2
    assert "model_sha256" in capsys.readouterr().err
    assert listing(output) == before


def test_features_that_were_replaced_are_something_else(tmp_path, capsys):
    folder = write_cohort(tmp_path / "c")
    assert train(folder, folder / "run", epochs=1) == 0
    assert evaluate(folder, folder / "run", folder / "e") == 0
    before = listing(folder / "e")
    path = folder / "features" / "s11.safetensors"
    features = load_file(path)["features"]
    save_file({"features": features[:-1]}, path)
    assert evaluate(folder, folder / "run", folder / "e") == 2
    assert "slides" in capsys.readouterr().err
    assert listing(folder / "e") == before


@pytest.mark.parametrize("name", ["metrics.json", "predictions.csv", "report.html", "run.json", "heatmaps"])
def test_a_users_file_of_a_results_name_is_not_written_over(cohort, tmp_path, name, capsys):
    output = tmp_path / "e"
    output.mkdir()
    (output / name).write_text("theirs")
    (output / ".env.tmpl").write_text("theirs")
    before = listing(output)
    assert evaluate(cohort, cohort / "run", output) == 2
    assert name in capsys.readouterr().err
    assert listing(output) == before


def test_the_runs_splits_are_understood_and_no_overlap_is_told_of_its_test(cohort, tmp_path, capsys):
    assert evaluate(cohort, cohort / "run", tmp_path / "e") == 0
    told, printed = capsys.readouterr()
    assert "splits are the run's" in printed
    assert told.startswith("test metrics of")
    assert "evaluated slides are among" not in printed
    evaluated, of_run = ((folder / "predictions.csv").read_text() for folder in (tmp_path / "e", cohort / "run"))
    assert evaluated == of_run
    assert json.loads((tmp_path / "e" / "run.json").read_text())["test_split"] == "test"


def test_slides_and_patients_of_the_training_are_counted(cohort, tmp_path, capsys):
    assert evaluate(cohort, cohort / "run", tmp_path / "e", "--split", "all") == 0
    told, printed = capsys.readouterr()
    rows = [line.split(",") for line in (cohort / "run" / "splits.csv").read_text().splitlines()[1:]]
    counts = {split: sum(row[2] == split for row in rows) for split in ("train", "validation")}
    assert f"{counts['train']} of 12 evaluated slides are among the run's training slides" in printed
    assert f"{counts['validation']} of 12 evaluated slides are among the run's validation slides" in printed
    assert told.startswith("metrics of 12 slides of all splits")
    # other slides of a patient that was trained on
    trained = next(row for row in rows if row[2] == "train")
    tested = [row for row in rows if row[2] == "test"]
    named = [(row[0], row[3], trained[1] if row is tested[0] else row[1], "test") for row in tested]
    write_table(tmp_path / "m.csv", named, ("slide_id", "label", "patient_id", "split"))
    more = ("--manifest", tmp_path / "m.csv")
    assert evaluate(cohort, cohort / "run", tmp_path / "f", *more) == 0
    assert f"1 evaluated patients have other slides in the run's training ({trained[1]})" in capsys.readouterr().err


def test_the_manifests_own_splits_go_first(cohort, tmp_path, capsys):
    with (cohort / "run" / "splits.csv").open() as file:
        trained = [line.split(",") for line in file if ",train," in line][:2]
    rows = [(row[0], row[3].strip(), "test") for row in trained]
    write_table(tmp_path / "m.csv", rows)
    options = ("--manifest", tmp_path / "m.csv", "--classes", "normal,tumor")
    assert evaluate(cohort, cohort / "run", tmp_path / "e", *options) == 0
    assert "2 of 2 evaluated slides are among the run's training slides" in capsys.readouterr().err
