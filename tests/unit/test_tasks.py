"""Tasks beside classification: what tables hold of them, what is refused, and what a run of each leaves behind."""

import csv
import json
import math
import re

import pytest
import torch
from tiny_runs import SLIDES, evaluate, train, write_cohort, write_table

from ds_wsi.bags.manifest import SlideEntry, parse_manifest
from ds_wsi.bags.splits import assign_splits
from ds_wsi.bags.target_columns import TargetColumns
from ds_wsi.bags.target_problems import split_target_problems
from ds_wsi.commands.functions import rows_of_file
from ds_wsi.evaluation.tasks.answers import TaskAnswers
from ds_wsi.evaluation.tasks.files import write_rows
from ds_wsi.models import ModelConfig
from ds_wsi.targets.task import Task, fitted_task
from ds_wsi.training.outcome import best_entry
from ds_wsi.training.stopping import stop_reason

SURVIVAL = TargetColumns("survival", (), "months", "event")
HEADS = ("slide_id", "patient_id", "split", "months", "event", "score", "grade", "a", "b", "center")


def rows_of(**changes):
    """Twelve slides of as many patients, six to train on; `changes` are {slide: {column: cell}}."""
    rows = []
    for k, name in enumerate(SLIDES):
        split = "train" if k < 6 else "validation" if k < 9 else "test"
        cells = (
            name,
            f"p{k}",
            split,
            1 + k * 5 % 7,
            int(k % 3 > 0),
            k * 7 % 5 / 2,
            k % 3,
            k % 2,
            int(k % 3 == 1),
            "xy"[k % 2],
        )
        rows.append({**dict(zip(HEADS, cells, strict=True)), **changes.get(name, {})})
    return [tuple(row.values()) for row in rows]


def parsed(tmp_path, columns, classes=None, **changes):
    path = write_table(tmp_path / "m.csv", rows_of(**changes), HEADS)
    return parse_manifest(path, classes, need_slides=False, columns=columns)


class TestTables:
    def test_targets_of_every_kind_are_read_and_empty_cells_are_missing(self, tmp_path):
        manifest, problems = parsed(tmp_path, SURVIVAL, s01={"months": "", "event": ""})
        assert problems == []
        assert [slide.target for slide in manifest.slides[:3]] == [(1.0, 0.0), (None, None), (4.0, 1.0)]
        assert [slide.is_labelled for slide in manifest.slides[:2]] == [True, False]
        regression, _ = parsed(tmp_path, TargetColumns("regression", ("score",)), s02={"score": ""})
        assert [slide.target for slide in regression.slides[:3]] == [(0.0,), (1.0,), (None,)]
        several, _ = parsed(tmp_path, TargetColumns("multilabel", ("a", "b")), s00={"a": "", "b": "Yes"})
        assert several.slides[0].target == (None, 1.0)
        assert several.classes == ("a", "b")

    def test_events_and_censorship_are_opposite_and_words_mean_what_they_say(self, tmp_path):
        said = {"s00": {"event": 1}, "s01": {"event": 0}, "s02": {"event": "Dead"}, "s03": {"event": "alive"}}
        events, _ = parsed(tmp_path, SURVIVAL, **said)
        censored, _ = parsed(tmp_path, TargetColumns("survival", (), "months", "event", censored=True), **said)
        assert [slide.target[1] for slide in events.slides[:4]] == [1.0, 0.0, 1.0, 0.0]
        assert [slide.target[1] for slide in censored.slides[:4]] == [0.0, 1.0, 1.0, 0.0]

    def test_all_problems_of_all_rows_are_told_at_once(self, tmp_path):
        _, problems = parsed(
            *(tmp_path, SURVIVAL),
            s00={"months": 0},
            s01={"event": "maybe"},
            s02={"months": "long"},
            s03={"months": "", "event": 1},
            s04={"patient_id": "p5"},
            s06={"event": "NA"},
        )
        expected = [
            r"months must be positive, got 0 \(slide s00, row 2\)",
            r"event must be one of .*, got 'maybe' \(slide s01, row 3\)",
            r"months must be a number, got 'long' \(slide s02, row 4\)",
            r"months must be given where event is, got an empty cell \(slide s03, row 5\)",
            r"patient p5 must have one months and event, got 7 with event \(s04\) and 5 with event \(s05\)",
            r"event must be one of .*, got 'NA' .*leave the cell empty",
        ]
        for pattern in expected:
            assert any(re.search(pattern, line) for line in problems), (pattern, problems)
        assert len(problems) == len(expected)

    def test_the_order_of_grades_is_said_or_numbers(self, tmp_path):
        grades = TargetColumns("ordinal", ("grade",))
        numbers, problems = parsed(tmp_path, grades, s00={"grade": "10"})
        assert (numbers.classes, problems) == (("0", "1", "2", "10"), [])
        words = {name: {"grade": ("low", "high")[k % 2]} for k, name in enumerate(SLIDES)}
        _, problems = parsed(tmp_path, grades, **words)
        assert "the order of the grades of grade must be said" in problems[0]
        ordered, problems = parsed(tmp_path, grades, ("low", "high"), **words)
        assert ([slide.label for slide in ordered.slides[:2]], problems) == ([0, 1], [])

    def test_splits_that_teach_or_measure_nothing_are_told(self, tmp_path):
        censored, _ = parsed(tmp_path, SURVIVAL, **{name: {"event": 0} for name in SLIDES[6:9]})
        (problem,) = split_target_problems(censored)
        assert problem.startswith("the validation split must have an event, got none in event of 3 slides")
        same, _ = parsed(
            tmp_path, TargetColumns("regression", ("score",)), **{name: {"score": 2} for name in SLIDES[:6]}
        )
        assert split_target_problems(same)[0].startswith("score must differ within the training split, got 2 alone")
        empty, _ = parsed(tmp_path, TargetColumns("multilabel", ("a",)), **{name: {"a": ""} for name in SLIDES[9:]})
        assert split_target_problems(empty)[0].startswith(
            "the test split must have a target, got none in a of 3 slides"
        )

    def test_drawn_splits_share_the_events_out(self, tmp_path):
        changes = {name: {"split": "", "event": int(k % 2)} for k, name in enumerate(SLIDES)}
        manifest, problems = parsed(tmp_path, SURVIVAL, **changes)
        drawn = assign_splits(manifest, seed=3)
        assert problems == []
        for split in ("train", "validation", "test"):
            assert {slide.target[1] for slide in drawn.in_split(split)} == {0.0, 1.0}


def test_bins_scales_and_weights_are_of_the_rows_that_are_given():
    task = Task("survival", "nll", ("months", "event"))
    fitted = fitted_task(
        task, [(5.0, 1.0), (9.0, 0.0), (2.0, 1.0), (None, None), (7.0, 1.0)], time_bins=2, balanced=False
    )
    assert (fitted.borders, fitted.aggregator_outputs) == ((5.0,), 2)
    scaled = fitted_task(Task("regression", "mse", ("score",)), [(1.0,), (None,), (3.0,)], time_bins=4, balanced=False)
    assert (scaled.mean, scaled.std) == (2.0, 1.0)
    assert scaled.answers(torch.tensor([[0.0], [2.0]]))[:, 0].tolist() == [2.0, 4.0]
    labels = Task("multilabel", "bce", ("a", "b"), ("a", "b"))
    rows = [(1.0, 0.0), (0.0, 0.0), (0.0, 1.0), (None, 0.0)]
    assert fitted_task(labels, rows, time_bins=4, balanced=True).pos_weight == (2.0, 3.0)
    again = Task.from_json(json.loads(json.dumps(fitted.to_json())), ())
    assert again == fitted


def test_a_lower_error_chooses_the_epoch_and_stops():
    history = [
        {"epoch": k, "eval_loss": 1.0, "eval_mae": mae, "eval_r2": -mae} for k, mae in enumerate([3, 2, 4, 5], 1)
    ]
    assert best_entry(history, "eval_mae")["epoch"] == best_entry(history, "eval_r2")["epoch"] == 2
    assert "eval_mae has not fallen below 2 of epoch 2 in 2 epochs" in stop_reason(history, "eval_mae", 2)
    assert stop_reason(history, "eval_mae", 3) is None


def test_a_config_of_before_is_of_classification(tmp_path):
    ModelConfig(None, "abmil", ("a", "b"), in_dim=3).write(tmp_path / "config.json")
    values = json.loads((tmp_path / "config.json").read_text())
    assert values.pop("task") == {}
    (tmp_path / "config.json").write_text(json.dumps({**values, "version": 5}))
    assert ModelConfig.read(tmp_path / "config.json").target_task is None


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = write_cohort(tmp_path_factory.mktemp("tasks"))
    write_table(folder / "m.csv", rows_of(s10={"score": ""}), HEADS)
    return folder


def words(*options):
    return [*options, "--heatmaps", "0", "--disable_tqdm"]


COX = ("--task", "survival", "--loss", "cox", "--time_column", "months", "--event_column", "event")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--task", "regression", "--loss", "cox"),
            "--loss of --task regression must be one of huber, mse, mae, got cox",
        ),
        (("--task", "survival", "--time_column", "months"), "must be given --time_column, and --event_column or"),
        ((*COX, "--censorship_column", "b"), "--event_column and --censorship_column must not be given together"),
        ((*COX, "--aggregator", "clam_sb"), "--aggregator of --task survival must be one of .*got clam_sb"),
        ((*COX, "--class_weights", "1,2"), "--class_weights must be given with --task classification"),
        ((*COX, "--metric_for_best_model", "mae"), "--metric_for_best_model must be one of c_index"),
        (COX, r"each step must have two bags or more for a Cox loss, got 1 in step 1 of 6. HINT: --bags_per_step 64"),
        ((*COX, "--bags_per_step", "5"), "got 1 in step 2 of 2"),
    ],
)
def test_what_contradicts_is_refused_by_name(cohort, tmp_path, options, message, capsys):
    assert train(cohort, tmp_path / "run", *options) != 0
    assert re.search(message, capsys.readouterr().err)


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_survival_run_tells_its_own_numbers_and_is_evaluated_to_the_same(cohort, tmp_path, capsys):
    run = tmp_path / "run"
    options = words(*COX, "--strata_column", "center", "--bags_per_step", "6", "--virtual_workers", "2")
    assert train(cohort, run, *options) == 0
    rows, metrics = table(run / "predictions.csv"), json.loads((run / "metrics.json").read_text())
    times, events, risks = ([float(row[name]) for row in rows] for name in ("months", "months_event", "months_risk"))
    pairs = [
        (risks[i] > risks[j]) + 0.5 * (risks[i] == risks[j])
        for i in range(3)
        for j in range(3)
        if events[i] and (times[i] < times[j] or (times[i] == times[j] and not events[j]))
    ]
    assert metrics["metrics"]["c_index"]["value"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert metrics["n_with_target"] == 3
    task = json.loads((run / "config.json").read_text())["task"]
    assert set(task["fitted"]["baselines"]) == {"x", "y"}
    assert task["fitted"]["cutoffs"]["split"] == "train"
    assert {row["months_group"] for row in rows} <= {"low risk", "high risk"}
    assert (run / "kaplan_meier.png").is_file()
    assert "Survival by risk group" in (run / "report.html").read_text()
    assert evaluate(cohort, run, tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["metrics"] == metrics["metrics"]
    assert table(tmp_path / "again" / "predictions.csv") == rows
    # Goes on with the same targets alone.
    write_table(cohort / "other.csv", rows_of(s00={"months": 30}), HEADS)
    more = [*options, "--resume_from_checkpoint", "--manifest", cohort / "other.csv"]
    capsys.readouterr()
    assert train(cohort, run, *more) != 0
    assert "label must be the checkpoint's, got another of 1 slide (s00: 1;0;x, got 30;0;x)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        (("--task", "regression", "--label_column", "score"), ["score", "score_predicted"]),
        (
            ("--task", "ordinal", "--label_column", "grade", "--loss", "link"),
            ["grade", "grade_predicted", "grade_raw", "grade_0", "grade_1", "grade_2"],
        ),
        (
            ("--task", "multilabel", "--label_column", "a,b"),
            ["a", "a_predicted", "a_probability", "b", "b_predicted", "b_probability"],
        ),
        (("--task", "survival", "--time_column", "months", "--event_column", "event"), None),
    ],
)
def test_a_run_of_each_task_writes_its_columns(cohort, tmp_path, options, columns):
    run = tmp_path / "run"
    assert train(cohort, run, *words(*options), epochs=1) == 0
    rows, metrics = table(run / "predictions.csv"), json.loads((run / "metrics.json").read_text())
    names = list(rows[0])
    assert names[:2] + names[-1:] == ["slide_id", "patient_id", "n_tiles"]
    assert columns is None or names[2:-1] == columns
    assert [row["slide_id"] for row in rows] == list(SLIDES[9:])
    assert all(entry["value"] is not None or metrics["reasons"][name] for name, entry in metrics["metrics"].items())
    if columns == ["score", "score_predicted"]:
        assert [row["score"] for row in rows] == ["1.5", "", "1.0"]
        assert metrics["n_with_target"] == 2
        errors = [abs(float(row["score"]) - float(row["score_predicted"])) for row in rows if row["score"]]
        assert metrics["metrics"]["mae"]["value"] == pytest.approx(sum(errors) / 2, abs=1e-12)
    if "--loss" in options:
        for row in rows:
            assert sum(float(row[f"grade_{k}"]) for k in range(3)) == pytest.approx(1)


def test_slides_without_a_target_count_nowhere():
    answers = TaskAnswers(Task("regression", "mse", ("score",), mean=1.0, std=2.0))
    slides = [SlideEntry(name, None, None, name, target=target) for name, target in (("s", (3.0,)), ("t", (None,)))]
    values = answers.epoch_metrics(torch.tensor([[1.0], [math.pi]]), slides)
    assert (values["eval_loss"], values["eval_mae"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("task", "written", "told"),
    [
        (
            {"kind": "survival", "columns": ["months", "event"]},
            {"months": "", "months_event": "1", "months_risk": "-0.5", "months_group": "low risk"},
            {"months": None, "months_event": 1.0, "months_risk": -0.5, "months_group": "low risk"},
        ),
        (
            {"kind": "ordinal", "columns": ["grade"]},
            {"grade": "2", "grade_predicted": "1", "grade_raw": "0.75"},
            {"grade": "2", "grade_predicted": "1", "grade_raw": 0.75},
        ),
        ({"kind": "multilabel", "columns": ["a"]}, {"a": "", "a_predicted": "1"}, {"a": None, "a_predicted": 1.0}),
    ],
)
def test_what_predict_returns_of_a_task_are_numbers(tmp_path, task, written, told):
    write_rows(tmp_path / "predictions.csv", [{"slide_id": "1", "patient_id": "01", **written, "n_tiles": "12"}])
    expected = {"slide_id": "1", "patient_id": "01", **told, "n_tiles": 12}
    assert rows_of_file(tmp_path / "predictions.csv", task) == [expected]
