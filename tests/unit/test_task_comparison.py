"""Runs of tasks beside each other: two compared, differences and exchanges by hand; many in tables, with directions."""

import csv
import itertools
import json

import numpy as np
import pytest

from ds_wsi.cli import main
from ds_wsi.evaluation import compare_runs
from ds_wsi.evaluation.comparison import comparison_to_json, format_comparison
from ds_wsi.evaluation.protocol import EvaluationProtocol
from ds_wsi.evaluation.record import RunRecord
from ds_wsi.evaluation.tables import write_tables
from ds_wsi.evaluation.tasks.files import write_rows

SCORES, A, B = [1.0, 2.0, 4.0, 3.0, 7.0], [1.5, 1.0, 4.5, 3.5, 6.0], [2.0, 4.0, 1.0, 3.0, 6.5]
EVALUATION = {"tiles": None, "runs": 1, "seed": 0}
SCORE = {"kind": "regression", "loss": "huber", "columns": ["score"]}
GRADE = {"kind": "ordinal", "loss": "bits", "columns": ["grade"]}
OS = {"kind": "survival", "loss": "cox", "columns": ["months", "event"]}
LABEL = {"kind": "multilabel", "loss": "bce", "columns": ["a"]}


def run_folder(folder, task, columns, classes=()):
    """A run's folder with these columns of predictions.csv, a slide per patient."""
    folder.mkdir()
    n = len(next(iter(columns.values())))
    rows = [
        {"slide_id": f"s{k}", "patient_id": f"p{k}", **{name: of[k] for name, of in columns.items()}, "n_tiles": 3}
        for k in range(n)
    ]
    write_rows(folder / "predictions.csv", rows)
    content = {"task": task, "classes": list(classes), "evaluation": EVALUATION}
    (folder / "metrics.json").write_text(json.dumps(content))
    return folder


def of_scores(tmp_path, b=B, scores=SCORES):
    a = run_folder(tmp_path / "a", SCORE, {"score": [*SCORES, None], "score_predicted": [*A, 9.0]})
    return a, run_folder(tmp_path / "b", SCORE, {"score": [*scores, None], "score_predicted": [*b, 0.0]})


def test_values_differences_and_every_exchange_by_hand(tmp_path):
    comparison = compare_runs(*of_scores(tmp_path), 200)
    y, a, b = map(np.array, (SCORES, A, B))
    mae = comparison.metrics["mae"]
    assert (mae.a, mae.b) == pytest.approx((np.abs(a - y).mean(), np.abs(b - y).mean()))
    assert mae.difference == pytest.approx(mae.b - mae.a)
    assert mae.low <= mae.difference <= mae.high
    pearson = comparison.metrics["pearson"]
    assert (pearson.a, pearson.b) == pytest.approx((np.corrcoef(a, y)[0, 1], np.corrcoef(b, y)[0, 1]))
    # The slide without a score takes no part: 5 patients, 32 exchanges.
    assert (comparison.n_slides, comparison.n_differing, comparison.smallest_p) == (5, 5, 2 / 32)
    differences = []
    for exchanged in itertools.product((False, True), repeat=5):
        first, second = np.where(exchanged, b, a), np.where(exchanged, a, b)
        differences.append(abs(np.corrcoef(second, y)[0, 1] - np.corrcoef(first, y)[0, 1]))
    observed = abs(pearson.difference)
    assert pearson.p_value == pytest.approx(np.mean([each >= observed - 1e-9 for each in differences]))


def test_the_bootstrap_is_paired_and_errors_say_which_way_is_better(tmp_path):
    shifted = [
        value + 1 for value in A
    ]  # by the same of each slide: the correlation's difference is 0 in all resamples
    comparison = compare_runs(*of_scores(tmp_path, shifted), 200)
    pearson = comparison.metrics["pearson"]
    assert (pearson.difference, pearson.p_value) == (pytest.approx(0.0, abs=1e-12), 1.0)
    lines = {line.split()[0]: line for line in format_comparison(comparison).splitlines()[3:]}
    assert lines["mae"].endswith("lower is better")
    assert not lines["pearson"].endswith("lower is better")
    assert "DeLong" not in format_comparison(comparison)
    json.dumps(comparison_to_json(comparison), allow_nan=False)


def test_grades_events_and_labels_are_compared_each_by_its_metrics(tmp_path):
    several = {
        "kind": "several",
        "loss": "sum",
        "columns": ["grade", "months", "event", "a"],
        "targets": [
            {"name": "grade", **GRADE, "classes": ["low", "mid", "high"]},
            {"name": "os", **OS, "classes": []},
            {"name": "a", **LABEL, "classes": ["a"]},
        ],
    }
    told = {
        "grade": ["low", "mid", "high", "mid", None],
        "months": [3.0, 5.0, 5.0, 9.0, 2.0],
        "months_event": [1, 1, 0, 1, 0],
        "a": [1, 0, 1, 0, None],
    }
    good = {
        "grade_predicted": ["low", "mid", "high", "high", "low"],
        "months_risk": [4.0, 3.0, 2.0, 1.0, 0.0],
        "a_probability": [0.9, 0.2, 0.6, 0.1, 0.5],
    }
    bad = {
        "grade_predicted": ["high", "mid", "low", "mid", "low"],
        "months_risk": [1.0, 2.0, 3.0, 4.0, 0.0],
        "a_probability": [0.1, 0.2, 0.6, 0.7, 0.5],
    }
    a = run_folder(tmp_path / "a", several, {**told, **bad})
    b = run_folder(tmp_path / "b", several, {**told, **good})
    metrics = compare_runs(a, b, 100).metrics
    assert (metrics["os.c_index"].a, metrics["os.c_index"].b) == (0.0, 1.0)
    assert (metrics["grade.accuracy"].a, metrics["grade.accuracy"].b) == (0.5, 0.75)
    assert (metrics["a.macro_auc"].a, metrics["a.macro_auc"].b) == (0.25, 1.0)
    firsts = [metrics[name].b for name in ("grade.quadratic_weighted_kappa", "os.c_index", "a.macro_auc")]
    assert metrics["mean"].b == pytest.approx(sum(firsts) / 3)
    assert "a.prevalence_a" not in metrics
    lines = format_comparison(compare_runs(a, b, 100)).splitlines()
    assert next(line for line in lines if line.startswith("grade.mae")).endswith("lower is better")


def test_what_does_not_fit_together_is_named(tmp_path):
    a, b = of_scores(tmp_path, scores=[1.0, 2.0, 4.0, 3.0, 8.0])
    with pytest.raises(ValueError, match=r"the same target for each slide, got others of s4"):
        compare_runs(a, b, 10)
    grade = run_folder(tmp_path / "g", GRADE, {"grade": ["0"], "grade_predicted": ["0"]}, ("0", "1"))
    with pytest.raises(ValueError, match=r"of one task, got regression of score and ordinal of grade"):
        compare_runs(a, grade, 10)
    fewer = run_folder(tmp_path / "f", SCORE, {"score": SCORES[:3], "score_predicted": A[:3]})
    with pytest.raises(ValueError, match=r"the same slides, got s3, s4 in one alone"):
        compare_runs(a, fewer, 10)
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match="of one task, got classification"):
        compare_runs(a, tmp_path / "c", 10)


def test_the_command_writes_what_it_tells(tmp_path, capsys):
    a, b = of_scores(tmp_path)
    assert not main(["compare", str(a), str(b), "--output_dir", str(tmp_path / "out"), "--n_resamples", "50"])
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert set(written["paired_bootstrap"]) == {"pearson", "spearman", "r2", "mae", "rmse"}
    assert written["delong"] is None
    assert "lower is better" in capsys.readouterr().out


def finished(folder, task, columns, metrics, training, seed=0, classes=()):
    """A finished run with these test metrics."""
    run_folder(folder, task, columns, classes)
    path = folder / "metrics.json"
    entries = {name: {"value": value} for name, value in metrics.items()}
    path.write_text(json.dumps({**json.loads(path.read_text()), "metrics": entries}))
    RunRecord("cohort", "resnet18", "abmil", training, seed, "", "test", EvaluationProtocol(), {}).write(folder)
    return folder


def test_tables_are_of_one_task_each_with_its_metrics_units_and_best(tmp_path):
    scores = {"score": SCORES, "score_predicted": A}
    grades = {"grade": ["0", "1"], "grade_predicted": ["0", "1"]}
    runs = [
        finished(tmp_path / "frozen", SCORE, scores, {"pearson": 0.5, "mae": 12.5}, "frozen"),
        finished(
            tmp_path / "tuned", SCORE, {**scores, "score_predicted": B}, {"pearson": 0.7, "mae": 9.25}, "end to end"
        ),
        finished(tmp_path / "same", SCORE, scores, {"pearson": 0.5, "mae": 12.5}, "frozen"),
        finished(tmp_path / "grade", GRADE, grades, {"quadratic_weighted_kappa": 0.8}, "frozen", classes=("0", "1")),
    ]
    text = write_tables(runs, tmp_path / "tables")
    assert "## cohort, regression of score" in text
    assert "## cohort, ordinal of grade (0 &lt; 1)" in text
    line = next(line for line in text.splitlines() if line.startswith("| resnet18") and "12.50" in line)
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    # frozen, end to end and the difference of r in percent; of the error in its unit, whose lowest is the best.
    assert cells == ["50.00", "**70.00**", "+20.00", "12.50", "**9.25**", "-3.25", "1 / 1"]
    assert "the lowest of Mean absolute error" in text
    assert "errors in the target's unit" in text
    assert "same: the same model on the same slides as" in text
    with (tmp_path / "tables" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["metric"], row["mean"], row["training"]) for row in rows if row["training"] == "end to end"] == [
        ("pearson", "0.7", "end to end"),
        ("mae", "9.25", "end to end"),
    ]
    only = write_tables(runs[:2], tmp_path / "one", ["MAE"])
    assert "Pearson" not in only
    with pytest.raises(ValueError, match=r"metric must be one of accuracy, .*pearson, mae, got 'c_index'"):
        write_tables(runs[:2], tmp_path / "none", ["c_index"])
