"""`ds-wsi evaluate` and `heatmap` on cohorts with other labels than the model's, with some, and with none."""

import csv
import itertools
import json
import re

import pytest
import torch
from safetensors.torch import save_file

from ds_wsi.cli import main
from ds_wsi.models import ModelConfig, build_model
from ds_wsi.models.config import save_model

WIDTH = 6
CLASSES = ("normal", "tumor", "other")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of features, and features of six slides."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = ModelConfig(None, "abmil", CLASSES, {}, in_dim=WIDTH)
    save_model(folder / "model", config, build_model(config).state_dict())
    (folder / "f").mkdir()
    for number in range(6):
        features = torch.randn(4 + number, WIDTH, generator=torch.Generator().manual_seed(number))
        save_file({"features": features}, folder / "f" / f"s{number}.safetensors")
    return folder


@pytest.fixture
def evaluate(folder, tmp_path, capsys):
    """Run the command on rows of a manifest: its exit status, what it says, and the folder of results."""
    numbers = itertools.count()

    def run(headings, rows, *more, command="evaluate"):
        lines = [",".join(headings), *(",".join(row) for row in rows)]
        (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
        given = [command, "--model", folder / "model", "--features_dir", folder / "f", "--manifest", tmp_path / "m.csv"]
        out = tmp_path / f"out{next(numbers)}"  # a folder of another evaluation is refused
        given += ["--output_dir", out, "--dataloader_num_workers", 0, *more]
        given += ["--split", "all"] if command == "evaluate" and "--split" not in more else []
        code = main([str(word) for word in given])
        return code, capsys.readouterr().err, out

    return run


def predictions(out):
    with (out / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


LABELLED = [(f"s{number}", CLASSES[number % 3]) for number in range(6)]


@pytest.mark.parametrize(("headings", "end"), [(("slide_id",), ()), (("slide_id", "label"), ("",))])
def test_slides_without_labels_are_predicted_without_metrics(evaluate, headings, end):
    code, said, out = evaluate(("slide_id", "label"), LABELLED)
    assert code == 0
    assert re.search(r"slides +6\n +patients +6\n +label normal +2\n +label tumor +2\n +label other +2\n", said)
    expected = predictions(out)
    assert {row["label"] for row in expected} == set(CLASSES)
    code, said, out = evaluate(headings, [(name, *end) for name, _ in LABELLED])
    assert code == 0
    assert "no labels in" in said
    assert "6 slides are predicted, without metrics and report" in said
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.json", "predictions", "predictions.csv"]
    assert predictions(out) == [{key: value for key, value in row.items() if key != "label"} for row in expected]


def test_labels_of_some_slides_are_refused_by_name_but_for_those_not_chosen(evaluate):
    rows = [(name, label if name != "s4" else "", "test" if name < "s4" else "train") for name, label in LABELLED]
    code, said, out = evaluate(("slide_id", "label", "split"), rows)
    assert code == 2
    assert "labels must be there for all slides of a metric, got none for 1 of 6 (s4; manifest" in said
    assert not (out / "predictions.csv").exists()
    code, _, out = evaluate(("slide_id", "label", "split"), rows, "--split", "test")
    assert code == 0
    assert [row["slide_id"] for row in predictions(out)] == ["s0", "s1", "s2", "s3"]
    assert json.loads((out / "metrics.json").read_text())["n_slides"] == 4


def test_only_the_slides_that_are_chosen_need_features(evaluate):
    rows = [(*row, "test") for row in LABELLED] + [("gone", "normal", "train")]
    assert evaluate(("slide_id", "label", "split"), rows, "--split", "test")[0] == 0
    code, said, _ = evaluate(("slide_id", "label", "split"), rows)
    assert code == 2
    assert "slide gone must have one file of features" in said


@pytest.mark.parametrize("classes", ["tumor,normal,other", "normal,tumor", "normal,tumor,other,more", "a,b,c"])
def test_a_model_keeps_its_classes_in_their_order(evaluate, classes):
    code, said, _ = evaluate(("slide_id", "label"), LABELLED, "--classes", classes)
    assert code == 2
    assert (
        f"--classes must be the model's, in their order, normal, tumor, other, got {classes.replace(',', ', ')}" in said
    )
    assert evaluate(("slide_id", "label"), LABELLED, "--classes", "normal,tumor,other")[0] == 0


def test_other_words_for_the_models_classes_are_mapped_or_refused(evaluate):
    code, _, out = evaluate(("slide_id", "label"), LABELLED)
    expected = predictions(out)
    rows = [(name, str(CLASSES.index(label))) for name, label in LABELLED]
    code, said, _ = evaluate(("slide_id", "label"), rows)
    assert code == 2
    assert "got '0' (slide s0, row 2)" in said
    assert "--map_labels LABEL=CLASS" in said
    code, _, out = evaluate(("slide_id", "label"), rows, "--map_labels", "0=normal,1=tumor,2=other")
    assert code == 0
    assert predictions(out) == expected
    code, said, _ = evaluate(("slide_id", "label"), rows, "--map_labels", "0=normal,1=tumor")
    assert code == 2
    assert "classes must be the model's, got 2" in said


def test_a_heat_map_needs_no_label_and_no_word_of_the_models(evaluate):
    for rows in ([(name, "") for name, _ in LABELLED], [(name, "NA") for name, _ in LABELLED]):
        assert evaluate(("slide_id", "label"), rows, command="heatmap")[0] == 0
    code, said, _ = evaluate(("slide_id",), [("s0",), ("s1",)], "--slide_ids", "s00", command="heatmap")
    assert code == 2
    assert "--slide_ids must be of the manifest, got s00. HINT: did you mean s0?" in said
