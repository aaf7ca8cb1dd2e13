"""Several targets in one run: what is asked and refused, what a run leaves behind, and the sum of their losses."""

import csv
import json
import math
import re

import numpy as np
import pytest
import torch
from test_tasks import HEADS, rows_of
from tiny_runs import SLIDES, evaluate, train, write_cohort, write_table

from ds_wsi.bags.manifest import SlideEntry, parse_manifest
from ds_wsi.bags.splits import assign_splits
from ds_wsi.bags.target_columns import TargetColumns
from ds_wsi.bags.target_problems import split_target_problems
from ds_wsi.commands.functions import rows_of_file
from ds_wsi.evaluation.tasks.several import SeveralAnswers, answers_of
from ds_wsi.models import ModelConfig
from ds_wsi.models.ordinal_answer import answer_of
from ds_wsi.targets.several import SeveralTargets, task_from_json
from ds_wsi.targets.task import Task
from ds_wsi.training.outcome import best_entry

SCORE, GRADE = Task("regression", "mse", ("score",)), Task("ordinal", "corn", ("grade",), ("0", "1", "2"))
LABEL = Task("multilabel", "bce", ("a",), ("a",))
THREE = SeveralTargets(("score", "grade", "a"), (SCORE, GRADE, LABEL), (2.0, 1.0, 0.5))
NAN = math.nan
TARGETS = torch.tensor([[1.0, 0.0, 1.0], [NAN, 2.0, 0.0], [3.0, NAN, NAN], [NAN, NAN, NAN]], dtype=torch.float64)


def test_each_target_is_divided_by_its_own_units_of_the_step():
    outputs = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    factors = THREE.factors(TARGETS)
    # 3 bags have a target; 2 scores; a grade of 0 is asked one question, of 2 both; 2 labels.
    assert factors == (2.0 * 3 / 2, 1.0 * 3 / 3, 0.5 * 3 / 2)
    z = outputs.detach()
    squares = (z[0, 0] - 1) ** 2 + (z[2, 0] - 3) ** 2
    p = z.sigmoid()
    corn = -(1 - p[0, 1]).log() - p[1, 1].log() - p[1, 2].log()
    label = -p[0, 3].log() - (1 - p[1, 3]).log()
    expected = 2 * squares / 2 + corn / 3 + 0.5 * label / 2
    loss = THREE.loss_sum(outputs, TARGETS, factors) / THREE.units(TARGETS)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-14)
    assert THREE.mean_loss(z, TARGETS) == pytest.approx(expected.item(), abs=1e-14)
    # In stacks: the factors are the whole step's. Those of each stack would be another loss.
    stacks = [slice(0, 1), slice(1, 4)]
    of_step = sum(THREE.loss_sum(outputs[s], TARGETS[s], factors) for s in stacks) / 3
    of_stacks = sum(THREE.mean_loss(z[s], TARGETS[s]) for s in stacks) / 2
    assert of_step.item() == pytest.approx(expected.item(), abs=1e-14)
    assert abs(of_stacks - expected.item()) > 1e-3


def test_a_target_without_any_in_the_step_is_a_zero_with_its_graph():
    missing = TARGETS.clone()
    missing[:, 0] = NAN
    outputs = torch.randn(4, 4).double().requires_grad_()
    factors = THREE.factors(missing)
    assert factors[0] == 0.0
    THREE.loss_sum(outputs, missing, factors).backward()
    assert not outputs.grad[:, 0].any()
    assert outputs.grad[0, 1] != 0
    nothing = torch.full((2, 3), NAN, dtype=torch.float64)
    outputs = torch.randn(2, 4).double().requires_grad_()
    assert (THREE.units(nothing), THREE.factors(nothing)) == (0, (0.0, 0.0, 0.0))
    THREE.loss_sum(outputs, nothing, THREE.factors(nothing)).backward()
    assert outputs.grad is not None
    assert not outputs.grad.any()


def test_json_brings_the_targets_back_and_places_follow_each_other():
    values = json.loads(json.dumps(THREE.to_json()))
    assert task_from_json(values, ()) == THREE
    link = SeveralTargets(("g", "s"), (Task("ordinal", "link", ("g",), ("x", "y", "z")), SCORE), (1.0, 1.0))
    assert [(part.outputs, part.scores) for part in link.parts] == [
        (slice(0, 3), slice(0, 1)),
        (slice(3, 4), slice(1, 2)),
    ]
    outputs = answer_of(link)(torch.tensor([[0.5, -2.0]]))
    assert outputs.shape == (1, 4)
    assert (outputs[0, 0].item(), outputs[0, 3].item()) == (0.5, -2.0)
    assert answer_of(THREE) is None


@pytest.mark.parametrize(
    ("names", "tasks", "weights", "message"),
    [
        (("x",), (SCORE,), (1.0,), "two or more"),
        (("x", "x"), (SCORE, LABEL), (1.0, 1.0), "names of targets must differ, got x again"),
        (("x", "y"), (SCORE, SCORE), (1.0, 1.0), "columns of targets must differ, got score again"),
        (("x", "y"), (SCORE, LABEL), (1.0, 0.0), "weight of target y must be positive"),
        (("x", "y"), (SCORE, Task("survival", "cox", ("t", "e"))), (1.0, 1.0), "must be a sum over bags, got cox"),
    ],
)
def test_targets_that_cannot_be_summed_are_refused(names, tasks, weights, message):
    with pytest.raises(ValueError, match=message):
        SeveralTargets(names, tasks, weights)


def test_metrics_are_of_each_targets_own_slides_and_resamples_share_patients():
    answers = SeveralAnswers(THREE)
    slides = [
        SlideEntry(f"s{k}", None, None, f"p{k}", target=tuple(None if math.isnan(v) else v for v in row))
        for k, row in enumerate(TARGETS.tolist())
    ]
    outputs = torch.tensor([[1.0, -1.0, -1, 2.0], [9.0, 1.0, 1.0, -2], [2.0, 0.0, 0.0, 0.0], [0.0, 0, 0, 0]]).double()
    values = answers.metrics(outputs, slides)
    assert values["score.mae"].value == 0.5  # of the two slides that have a score
    assert values["grade.accuracy"].value == 1.0
    assert values["a.macro_auc"].value == 1.0
    firsts = [values[f"{name}"].value for name in ("score.pearson", "grade.quadratic_weighted_kappa", "a.macro_auc")]
    assert values["mean"].value == pytest.approx(sum(firsts) / 3)
    (measure,) = answers.measures([outputs], slides)
    drawn = measure(np.array([[1, 1, 1, 1], [0, 0, 0, 4], [2, 0, 1, 0]]))
    assert drawn["score.mae"][0] == 0.5
    assert math.isnan(drawn["score.mae"][1])
    assert drawn["score.mae"][2] == pytest.approx(1 / 3)
    assert math.isnan(drawn["mean"][1])
    assert set(drawn) == set(values)


def test_lower_errors_of_a_target_choose_the_epoch():
    history = [{"epoch": k, "eval_loss": 1.0, "eval_til.mae": mae} for k, mae in enumerate([3, 2, 4], 1)]
    assert best_entry(history, "eval_til.mae")["epoch"] == 2


PARTS = TargetColumns(
    "several",
    (),
    parts=(
        TargetColumns("survival", (), "months", "event", name="os"),
        TargetColumns("ordinal", ("grade",), name="grade"),
    ),
)


def test_rows_of_several_targets_are_read_and_problems_are_each_targets(tmp_path):
    path = write_table(tmp_path / "m.csv", rows_of(s01={"grade": ""}, s02={"months": -1}), HEADS)
    manifest, problems = parse_manifest(path, need_slides=False, columns=PARTS)
    assert [slide.target for slide in manifest.slides[:2]] == [(1.0, 0.0, 0.0), (6.0, 1.0, None)]
    assert manifest.columns.parts[1].classes == ("0", "1", "2")
    assert len(problems) == 1
    assert "months must be positive, got -1" in problems[0]
    changes = {name: {"event": 0} for name in SLIDES[6:9]} | {name: {"grade": ""} for name in SLIDES[9:]}
    changes |= {"s00": {"patient_id": "p1"}}
    path = write_table(tmp_path / "n.csv", rows_of(**changes), HEADS)
    manifest, problems = parse_manifest(path, need_slides=False, columns=PARTS)
    assert len(problems) == 1
    assert "patient p1 must have one months and event" in problems[0]
    told = split_target_problems(manifest)
    assert [line.split(",")[0] for line in told] == [
        "the validation split must have an event",
        "the test split must have a target",
    ]
    drawn, _ = parse_manifest(
        write_table(tmp_path / "d.csv", rows_of(**{name: {"split": ""} for name in SLIDES}), HEADS),
        need_slides=False,
        columns=PARTS,
    )
    assert all(slide.split for slide in assign_splits(drawn, seed=1).slides)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = write_cohort(tmp_path_factory.mktemp("several"))
    write_table(folder / "m.csv", rows_of(s10={"score": ""}, s02={"grade": ""}), HEADS)
    return folder


MANY = ("--targets", "score:regression:2,grade:coral,a:multilabel,os:survival")
COLUMNS = ("--time_column", "months", "--event_column", "event")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--targets", "score:regression"), "--targets must be two or more, got score:regression"),
        (("--targets", "score,grade:ordinal"), "--targets must be NAME:KIND or NAME:KIND:WEIGHT"),
        (("--targets", "score:regression:-1,a:bce"), "with a weight above 0, got 'score:regression:-1'"),
        (("--targets", "score:number,a:bce"), "the kind of a target must be one of regression, ordinal"),
        (("--targets", "os:cox,a:bce", *COLUMNS), "must be a sum over slides, got cox .*couples the slides of a step"),
        (("--targets", "score:mae,a:bce", "--loss", "cox"), "--loss must be given with one target, got cox"),
        (("--targets", "os:nll,a:bce"), "must be given --time_column, and --event_column"),
        (("--targets", "a:bce,a:bce"), "names of targets must differ, got a again"),
        (("--targets", "a:bce,b:bce", "--task", "ordinal"), "--targets must be given without --task"),
        (("--targets", "a:bce,b:bce", "--label_column", "a"), "--label_column must be given with one target"),
        (
            ("--targets", "a:bce,b:bce", "--metric_for_best_model", "a.mae"),
            "--metric_for_best_model must be one of mean, a.macro_auc, .*got 'a.mae'",
        ),
        (("--targets", "a:bce,b:bce", "--aggregator", "clam_sb"), "--aggregator of --task several must be one of"),
    ],
)
def test_what_contradicts_is_refused_by_name(cohort, tmp_path, options, message, capsys):
    assert train(cohort, tmp_path / "run", *options) != 0
    assert re.search(message, capsys.readouterr().err)


def test_a_run_of_several_targets_leaves_what_each_alone_would(cohort, tmp_path, capsys):
    run = tmp_path / "run"
    options = (*MANY, *COLUMNS, "--bags_per_step", "4", "--heatmaps", "0", "--disable_tqdm")
    assert train(cohort, run, *options, "--metric_for_best_model", "os.ibs", epochs=2) == 0
    rows = list(csv.DictReader((run / "predictions.csv").open(newline="")))
    expected = ["score", "score_predicted", "grade", "grade_predicted", "grade_raw", "grade_0", "grade_1", "grade_2"]
    expected += ["a", "a_predicted", "a_probability", "months", "months_event", "months_risk"]
    assert list(rows[0])[2 : 2 + len(expected)] == expected
    metrics = json.loads((run / "metrics.json").read_text())
    errors = [abs(float(row["score"]) - float(row["score_predicted"])) for row in rows if row["score"]]
    assert len(errors) == 2
    assert metrics["metrics"]["score.mae"]["value"] == pytest.approx(sum(errors) / 2, abs=1e-12)
    assert {name.partition(".")[0] for name in metrics["metrics"]} == {"mean", "score", "grade", "a", "os"}
    assert [target["name"] for target in metrics["task"]["targets"]] == ["score", "grade", "a", "os"]
    values = json.loads((run / "config.json").read_text())
    assert (values["version"], values["task"]["kind"], values["classes"]) == (8, "several", [])
    assert values["task"]["fitted"]["os"]["cutoffs"]["split"] == "train"
    assert values["task"]["fitted"]["a"]["thresholds"]["split"] == "validation"
    history = json.loads((run / "history.json").read_text())
    assert all("eval_os.ibs" in entry for entry in history)
    report = (run / "report.html").read_text()
    for words in ("Predictions over values (score)", "Survival by risk group (os)", "score.pearson"):
        assert words in report
    assert (run / "os_kaplan_meier.png").is_file()
    assert evaluate(cohort, run, tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["metrics"] == metrics["metrics"]
    (first, *_) = rows_of_file(run / "predictions.csv", values["task"])
    assert (type(first["grade"]), type(first["score"]), type(first["months_risk"])) == (str, float, float)
    answers = answers_of(ModelConfig.read(run / "config.json"))
    assert isinstance(answers, SeveralAnswers)
    assert answers.task.weights == (2.0, 1.0, 1.0, 1.0)


def test_a_config_of_one_target_is_read_as_before(tmp_path):
    task = {**SCORE.to_json(), "fitted": {}}
    ModelConfig(None, "abmil", (), in_dim=3, task=task).write(tmp_path / "config.json")
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "version": 6}))
    assert ModelConfig.read(tmp_path / "config.json").target_task == SCORE
