"""A run's step of every loss has the gradient of one process over all its bags: in float64, whatever the layout."""

import math
from pathlib import Path

import pytest
import torch
from task_cases import GRADES, TRAIN, number, outputs_of, plain_model, run_steps, table_of, write_cohort

from harness import run_ranks

pytestmark = pytest.mark.distributed
TOLERANCE = 1e-10
REGRESSION = {"task": "regression", "label_column": ("score",)}
ORDINAL = {"task": "ordinal", "label_column": ("grade",)}
SURVIVAL = {"task": "survival", "time_column": "months", "event_column": "event"}
COX = {**SURVIVAL, "loss": "cox"}
TASKS = {
    **{loss: {**REGRESSION, "loss": loss} for loss in ("huber", "mse", "mae")},
    **{loss: {**ORDINAL, "loss": loss} for loss in ("bits", "corn", "coral", "link")},
    "bce": {"task": "multilabel", "label_column": ("a", "b"), "pos_weight": "balanced"},
    "nll": {**SURVIVAL, "nll_alpha": 0.3, "time_bins": 3},
    "several": {
        **{**SURVIVAL, "task": "several", "nll_alpha": 0.3, "time_bins": 3},
        "targets": ("score:huber:2", "grade:corn", "a:bce:0.5", "os:nll"),
    },
    "of_grades": {"task": "several", "targets": ("grade:link", "b:bce:3", "score:mse")},
    "efron": COX,
    "breslow": {**COX, "ties": "breslow", "strata_column": "center"},
    "no_event": {**COX, "event_column": "early"},  # the second step's slides have none
}
# Slides and micro-steps of a process; 11 slides leave the last step's last stacks without a bag.
STACKED, ALONE = {"slides": 2, "micro_steps": 3}, {"slides": 6}
DEALT = {"stacking": {"bags_per_step": 7, "virtual_workers": 2}}
RAGGED = {"micro_steps": 3}
ONE = [(name, STACKED, 0.0) for name in ("huber", "corn", "link", "bce", "nll", "efron", "several")]
ONE += [("efron", ALONE, 0.3), ("efron", STACKED, 0.3), ("breslow", DEALT, 0.0), ("no_event", STACKED, 0.0)]
TWO = [(name, RAGGED, 0.0) for name in TASKS if name not in ("no_event", "mae", "mse")]
TWO += [("efron", {"slides": 3}, 0.3), ("efron", RAGGED, 0.3), ("breslow", DEALT, 0.0), ("huber", DEALT, 0.0)]
SHARED = {"slides": 2, "micro_steps": 3, "tile_parallel": {"size": 2}}
TWO += [(name, SHARED, 0.0) for name in ("efron", "link", "nll", "several")]
TWO += [("several", DEALT, 0.0)]
# All losses, in 1 to 3 stacks of a step on each of 4 ranks, and accumulated.
FOUR = [(name, {"micro_steps": 2}, 0.0) for name in TASKS if name != "no_event"]
FOUR += [(name, {"slides": 3}, 0.0) for name in ("huber", "corn", "bce", "nll", "efron", "several")]
FOUR += [(name, {"slides": 1, "micro_steps": 3}, 0.3) for name in ("link", "breslow", "several")]
FOUR += [(name, {"stacking": {"bags_per_step": 11, "virtual_workers": 3}}, 0.0) for name in ("efron", "several")]
FOUR += [(name, {**SHARED, "slides": 1}, 0.0) for name in ("efron", "several")]
# In one process FSDP2 comes before DeepSpeed, which leaves its mark in the environment.
ENGINES = (("efron", "fsdp"), ("link", "fsdp"), ("efron", "zero2"), ("efron", "zero3"), ("link", "zero3"))
SHARDED = [(name, {"micro_steps": 3, "engine": engine}, 0.0) for name, engine in ENGINES]
IN_FLOAT32 = 2e-5


def targets_of(folder, task, slides):
    rows = [table_of(folder)[k] for k in slides]
    if task["task"] == "several":
        columns = [("months", "event") if word == "os:nll" else (word.split(":")[0],) for word in task["targets"]]
        return [[tuple(_value(name, row[name]) for name in names) for names in columns] for row in rows]
    columns = {"regression": ["score"], "ordinal": ["grade"], "multilabel": ["a", "b"]}.get(task["task"])
    if columns is None:
        return [(number(row["months"]), number(row[task["event_column"]])) for row in rows]
    if columns == ["grade"]:
        return [(float(GRADES.index(row["grade"])) if row["grade"] else math.nan,) for row in rows]
    return [tuple(number(row[name]) for name in columns) for row in rows]


def _value(name, text):
    return number(text) if name != "grade" else float(GRADES.index(text)) if text else math.nan


def plain_cox(theta, targets, strata, ties):
    """Every event, one after the other, with sums written out."""
    total, n_events = theta.new_zeros(()), 0
    for stratum in sorted(set(strata)):
        rows = [k for k in range(len(targets)) if strata[k] == stratum and not math.isnan(targets[k][0])]
        for time in sorted({targets[k][0] for k in rows if targets[k][1] == 1}):
            tied = [k for k in rows if targets[k] == (time, 1.0)]
            at_risk = sum(theta[k].exp() for k in rows if targets[k][0] >= time)
            of_tied = sum(theta[k].exp() for k in tied)
            for index, k in enumerate(tied):
                share = index / len(tied) if ties == "efron" else 0.0
                total = total + (at_risk - share * of_tied).log() - theta[k]
            n_events += len(tied)
    return (total / n_events if n_events else total * 0), n_events


def plain_terms(name, z, target, scale):
    """Losses of a bag's questions, each once."""
    y = target[0]
    if name in ("huber", "mse", "mae"):
        error = z[0] - (y - scale["mean"]) / scale["std"]
        huber = error**2 / 2 if abs(error.item()) < 1 else error.abs() - 0.5
        return [] if math.isnan(y) else [{"huber": huber, "mse": error**2, "mae": error.abs()}[name]]
    if name == "bce":
        assert scale["pos_weight"] is None or len(scale["pos_weight"]) == 2
        pairs = zip(z, target, scale["pos_weight"] or [1.0], strict=True)
        return [
            -weight * t * p.sigmoid().log() - (1 - t) * (1 - p.sigmoid()).log()
            for p, t, weight in pairs
            if not math.isnan(t)
        ]
    if name == "nll":
        if math.isnan(y):
            return []
        last = sum(border < y for border in scale["borders"])
        hazards = z.sigmoid()
        survived = sum(((1 - h).log() for h in hazards[:last]), z.new_zeros(()))
        if target[1] == 1:
            return [-(survived + hazards[last].log())]
        return [-(1 - 0.3) * (survived + (1 - hazards[last]).log())]
    if math.isnan(y):
        return []
    if name == "link":
        cuts = [z[1], z[1] + torch.nn.functional.softplus(z[2])]
        below = [0.0, *((cut - z[0]).sigmoid() for cut in cuts), 1.0]
        return [-(below[int(y) + 1] - below[int(y)]).log()]
    asked = [k for k in range(2) if name != "corn" or y >= k]
    bits = [-(z[k].sigmoid() if y > k else 1 - z[k].sigmoid()).log() for k in asked]
    return bits if name == "corn" else [sum(bits)]


def plain_loss(folder, name, step, number_of_step):
    """The loss of all the step's bags in one process, its model, and the same by the wrong denominators."""
    model, task = plain_model(step["config"], step["before"]), TASKS[name]
    stacks = [group for groups in step["stacks"] for group in groups if group]
    outputs = [outputs_of(model, folder, stack, number_of_step) for stack in stacks]
    if task.get("loss") == "cox":
        strata = [table_of(folder)[k]["center"] if "strata_column" in task else "" for stack in stacks for k in stack]
        targets = [targets_of(folder, task, stack) for stack in stacks]
        theta, ties = torch.cat(outputs)[:, 0], task.get("ties", "efron")
        loss, _ = plain_cox(theta, [target for part in targets for target in part], strata, ties)
        parts = iter(strata)
        each = [
            plain_cox(z[:, 0], its, [next(parts) for _ in its], ties)[0]
            for z, its in zip(outputs, targets, strict=True)
        ]
        return model, loss, sum(each) / len(each)
    if task["task"] == "several":
        return model, *plain_several(step, outputs, [targets_of(folder, task, stack) for stack in stacks])
    scale = step["config"]["task"]
    terms = [
        [
            term
            for z, target in zip(out, targets_of(folder, task, stack), strict=True)
            for term in plain_terms(name, z, target, scale)
        ]
        for out, stack in zip(outputs, stacks, strict=True)
    ]
    flat = [term for part in terms for term in part]
    each = [sum(part) / len(part) if part else outputs[0].sum() * 0 for part in terms]
    return model, sum(flat) / len(flat), sum(each) / len(each)


def plain_several(step, outputs, targets):
    """Sum the targets' means over their terms of the whole step, times their weights; and over those of each stack."""
    total, wrong, first = 0.0, 0.0, 0
    for index, entry in enumerate(step["config"]["task"]["targets"]):
        width = {"corn": 2, "link": 3, "nll": len(entry["borders"]) + 1}.get(entry["loss"], 1)
        columns = slice(first, first + width)
        first += width
        terms = [
            [
                term
                for z, target in zip(out, of_stack, strict=True)
                for term in plain_terms(entry["loss"], z[columns], target[index], entry)
            ]
            for out, of_stack in zip(outputs, targets, strict=True)
        ]
        flat = [term for part in terms for term in part]
        total = total + entry["weight"] * (sum(flat) / len(flat) if flat else outputs[0].sum() * 0)
        each = [sum(part) / len(part) if part else outputs[0].sum() * 0 for part in terms]
        wrong = wrong + entry["weight"] * sum(each) / len(each)
    return total, wrong


def gradient_of(model, loss):
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {key: torch.zeros_like(p) if p.grad is None else p.grad.clone() for key, p in model.named_parameters()}


def furthest(first, second):
    assert first.keys() == second.keys()
    return max((first[key] - second[key]).abs().max().item() for key in first)


def check(folder, name, steps, tolerance=TOLERANCE):
    differing, n_slides = [], 0
    for index, step in enumerate(steps):
        model, loss, wrong = plain_loss(folder, name, step, index)
        expected = gradient_of(model, loss)
        assert furthest(step["gradient"], expected) < tolerance, (name, index)
        assert step["loss"] == pytest.approx(loss.item() * step["units"], rel=1e-5)  # summed in float32
        differing.append(furthest(gradient_of(model, wrong), expected))
        n_slides += sum(len(group) for groups in step["stacks"] for group in groups)
    assert name == "no_event" or n_slides == TRAIN
    return max(differing)


def on_ranks(folder: str, cases: list, prefix: str):
    return [
        run_steps(Path(folder), f"{prefix}_{index}", TASKS[name], layout, dropout, name == "efron" and dropout > 0)
        for index, (name, layout, dropout) in enumerate(cases)
    ]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_cohort(folder)
    return folder


@pytest.mark.parametrize(("name", "layout", "dropout"), ONE)
def test_one_process_in_stacks_is_one_process(cohort, name, layout, dropout):
    counted = name == "efron" and dropout > 0
    steps = run_steps(cohort, f"one_{name}_{len(layout)}_{dropout}", TASKS[name], layout, dropout, counted)
    if name == "no_event":
        first, without = steps
        assert first["units"] == 3
        assert (without["loss"], without["units"]) == (0.0, 0)
        assert all(not value.any() for value in without["gradient"].values())
        steps = [first]
    if counted:  # a first pass moves no statistic
        assert [step["calls"] for step in steps] == [len(step["stacks"]) for step in steps]
    wrong = check(cohort, name, steps)
    assert layout is not STACKED or wrong > 1e-3, "another denominator must be noticed"


def check_two_ranks(cohort, cases, prefix, tolerance):
    results = run_ranks(on_ranks, 2, str(cohort), cases, prefix)
    for index, (name, layout, _) in enumerate(cases):
        first, second = results[0][index], results[1][index]
        assert all(furthest(a["gradient"], b["gradient"]) == 0 for a, b in zip(first, second, strict=True))
        wrong = check(cohort, name, first, tolerance)
        assert layout is not RAGGED or wrong > 1e-3, "another denominator must be noticed"
    ragged = results[0][[name for name, *_ in cases].index("efron")]
    assert any(not group for groups in ragged[-1]["stacks"] for group in groups), "a process must have been idle"


def test_two_ranks_in_stacks_are_one_process(cohort):
    check_two_ranks(cohort, TWO, "two", TOLERANCE)


@pytest.mark.slow
def test_four_ranks_in_stacks_are_one_process(cohort):
    results = run_ranks(on_ranks, 4, str(cohort), FOUR, "four")
    for index, (name, layout, _) in enumerate(FOUR):
        each = [of_rank[index] for of_rank in results]
        for of_rank in each[1:]:
            assert all(furthest(a["gradient"], b["gradient"]) == 0 for a, b in zip(each[0], of_rank, strict=True))
        wrong = check(cohort, name, each[0])
        assert layout != {"micro_steps": 2} or wrong > 1e-3, "another denominator must be noticed"


@pytest.mark.slow
def test_two_ranks_under_engines_that_shard_are_one_process(cohort):
    check_two_ranks(cohort, SHARDED, "sharded", IN_FLOAT32)
