"""What is written of a task's answers: metrics.json, predictions.csv, and pictures with their numbers beside."""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ds_wsi.bags.cohort import Cohort
from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.bags.slide_entry import bag_names, bag_word, slides_of_rows
from ds_wsi.evaluation.bootstrap import MetricInterval, bootstrap_measures, format_table, metrics_to_json
from ds_wsi.evaluation.protocol import EvaluationProtocol
from ds_wsi.evaluation.task_metrics.follow_up import per_patient
from ds_wsi.evaluation.task_metrics.risk_groups import (
    RiskGroups,
    compare_risk_groups,
    curve_rows,
    group_names,
    risk_group,
)
from ds_wsi.evaluation.task_metrics.table import of_target
from ds_wsi.evaluation.tasks.answers import TaskAnswers, reasons
from ds_wsi.evaluation.tasks.fitted import follow_up_of
from ds_wsi.evaluation.tasks.several import Answers, SeveralAnswers
from ds_wsi.runtime.files import atomic_path, json_number
from ds_wsi.runtime.words import counted
from ds_wsi.targets.ordinal import decided_class, raw_score
from ds_wsi.targets.several import AnyTask, Part, SeveralTargets

CURVES, SCATTER = "kaplan_meier", "scatter"


@dataclass(frozen=True)
class TaskScores:
    """The metrics of a set of slides, of those among them that have a target.

    Attributes:
        answers: how outputs are answers.
        slides: those with a target.
        n_predicted: how many were predicted.
        intervals: metric -> the mean of the runs', with its interval.
        runs: metric -> its value in each run, their mean and sample standard deviation.
        reasons: metric -> why it is undefined, or what was left out of it; of the first run.
        loss: the mean loss of the first run; NaN where undefined.
    """

    answers: Answers
    slides: tuple[SlideEntry, ...]
    n_predicted: int
    intervals: dict[str, MetricInterval]
    runs: dict[str, dict[str, Any]]
    reasons: dict[str, str]
    loss: float

    @classmethod
    def of(cls, answers: Answers, slides: Sequence[SlideEntry], outputs: Sequence[Tensor], seed: int) -> "TaskScores":
        """Measure the outputs of each run, [N, ...], of slides of whom one at least has a target."""
        labelled_rows = [row for row, slide in enumerate(slides) if slide.is_labelled]
        some = tuple(slides[row] for row in labelled_rows)
        each = [answers.metrics(run[labelled_rows], some) for run in outputs]
        intervals = bootstrap_measures(
            answers.measures([run[labelled_rows] for run in outputs], some),
            len(some),
            seed=seed,
            patients=[slide.patient_id for slide in some],
            shares=_shares(answers),
        )
        values = {name: [metrics[name].value for metrics in each] for name in intervals}
        loss = answers.mean_loss(outputs[0][labelled_rows], some)
        runs = {name: _of_runs(of_metric) for name, of_metric in values.items()}
        return cls(answers, some, len(slides_of_rows(slides)), intervals, runs, reasons(each[0]), loss)

    @property
    def positive(self) -> None:
        """No class is the positive one."""

    @property
    def n_slides(self) -> int:
        """Slides with a target."""
        return len(slides_of_rows(self.slides))

    @property
    def n_patients(self) -> int:
        """Patients whose slides have a target."""
        return len({slide.patient_id for slide in self.slides})

    def to_json(self, protocol: EvaluationProtocol) -> dict[str, Any]:
        """What metrics.json says of them, under the protocol that they were measured by."""
        task = self.answers.task
        several = [
            {"name": part.name, **_said(part.task), "classes": list(part.task.classes)} for part in _parts_of(task)
        ]
        return {
            "task": {**_said(task), **({"targets": several} if several else {})},
            "classes": list(task.classes),
            **({} if bag_word(self.slides) == "slide" else {"bag": bag_word(self.slides)}),
            "n_slides": self.n_predicted,
            "n_with_target": self.n_slides,
            "n_patients": self.n_patients,
            "evaluation": asdict(protocol),
            "loss": json_number(self.loss),
            "metrics": metrics_to_json(self.intervals),
            "reasons": self.reasons,
            "runs": self.runs,
        }

    def tell(self, tell: Callable[[str], object], split: str) -> None:
        """Tell the metrics as a table."""
        words = f"metrics of {counted(len(self.slides), bag_word(self.slides))} with a target"
        words = f"{words} of all splits" if split == "all" else f"{split} {words}"
        tell(f"{words}:\n{format_table(self.intervals)}")
        for name, reason in self.reasons.items():
            tell(f"{name}: {reason}")


def _parts_of(task: AnyTask) -> tuple[Part, ...]:
    return task.parts if isinstance(task, SeveralTargets) else ()


def _said(task: AnyTask) -> dict[str, Any]:
    return {"kind": task.kind, "loss": task.loss, "columns": list(task.columns)}


def _shares(answers: Answers) -> tuple[str, ...]:
    """The metrics that are shares of slides."""
    if isinstance(answers, SeveralAnswers):
        return tuple(of_target(part.name, "accuracy") for part in answers.task.parts if part.task.kind == "ordinal")
    return ("accuracy",) if answers.task.kind == "ordinal" else ()


def _of_runs(values: Sequence[float]) -> dict[str, Any]:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    numbers = [json_number(value) for value in (float(np.mean(values)), spread, *values)]
    return {"mean": numbers[0], "std": numbers[1], "values": numbers[2:]}


def prediction_rows(
    answers: Answers, cohort: Cohort, rows: Sequence[int], outputs: Sequence[Tensor], n_tiles: Sequence[int]
) -> list[dict[str, Any]]:
    """The rows of predictions.csv, one per slide; None: an empty cell. Answers are the mean over the runs.

    Args:
        answers: the model's.
        cohort: the slides.
        rows: theirs in the cohort, N.
        outputs: outputs of each run, [N, ...].
        n_tiles: N.
    """
    slides = [cohort.manifest.slides[row] for row in rows]
    columns = _columns(answers, slides, outputs)
    return [
        {
            **bag_names(slide),
            **{name: values[index] for name, values in columns.items()},
            "n_tiles": n_tiles[index],
        }
        for index, slide in enumerate(slides)
    ]


Columns = Mapping[str, Sequence[Any]]


def _columns(answers: Answers, slides: Sequence[SlideEntry], outputs: Sequence[Tensor]) -> Columns:
    """The columns of a task, of several targets one after the other."""
    if isinstance(answers, TaskAnswers):
        return _COLUMNS[answers.task.kind](answers, slides, outputs)
    columns: dict[str, Sequence[Any]] = {}
    for part in answers.parts(slides, outputs):
        columns |= _COLUMNS[part.answers.task.kind](part.answers, part.slides, part.outputs)
    return columns


def _target(slides: Sequence[SlideEntry], index: int) -> list[float | None]:
    return [slide.target[index] if slide.target else None for slide in slides]


def _regression(answers: TaskAnswers, slides: Sequence[SlideEntry], outputs: Sequence[Tensor]) -> Columns:
    (name,) = answers.task.columns
    return {name: _target(slides, 0), f"{name}_predicted": answers.mean_answers(outputs)[:, 0].tolist()}


def _ordinal(answers: TaskAnswers, slides: Sequence[SlideEntry], outputs: Sequence[Tensor]) -> Columns:
    (name,), grades = answers.task.columns, answers.task.classes
    above = answers.mean_answers(outputs)
    chances = answers.grade_chances(above)
    return {
        name: [None if value is None else grades[int(value)] for value in _target(slides, 0)],
        f"{name}_predicted": [grades[index] for index in decided_class(above).tolist()],
        f"{name}_raw": raw_score(above).tolist(),
        **{f"{name}_{grade}": chances[:, index].tolist() for index, grade in enumerate(grades)},
    }


def _multilabel(answers: TaskAnswers, slides: Sequence[SlideEntry], outputs: Sequence[Tensor]) -> Columns:
    chances, columns = answers.mean_answers(outputs), {}
    for index, name in enumerate(answers.task.classes):
        of_label = chances[:, index]
        columns[name] = [None if value is None else int(value) for value in _target(slides, index)]
        columns[f"{name}_predicted"] = (of_label >= answers.label_threshold(index)).int().tolist()
        columns[f"{name}_probability"] = of_label.tolist()
    return columns


def _survival(answers: TaskAnswers, slides: Sequence[SlideEntry], outputs: Sequence[Tensor]) -> Columns:
    name, fitted = answers.task.columns[0], answers.fitted
    risks = answers.mean_answers(outputs)[:, 0]
    events = _target(slides, 1)
    columns: dict[str, Sequence[Any]] = {
        name: _target(slides, 0),
        f"{name}_event": [None if event is None else int(event) for event in events],
        f"{name}_risk": risks.tolist(),
    }
    times = np.empty(0) if fitted.reference is None else fitted.reference.times
    survival = answers.mean_survival(outputs, slides, times) if len(times) else None
    for column, time in enumerate(times if survival is not None else ()):
        assert survival is not None
        told = survival[:, column].tolist()
        columns[f"{name}_survival_{time:g}"] = [None if math.isnan(chance) else chance for chance in told]
    if fitted.cutoffs is not None:
        names = group_names(fitted.cutoffs)
        columns[f"{name}_group"] = [names[group] for group in risk_group(risks.numpy(), fitted.cutoffs)]
    return columns


_COLUMNS: Mapping[str, Callable[[TaskAnswers, Sequence[SlideEntry], Sequence[Tensor]], Columns]] = {
    "regression": _regression,
    "ordinal": _ordinal,
    "multilabel": _multilabel,
    "survival": _survival,
}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of one form as a CSV, atomically; numbers with every digit, None as an empty cell."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        for row in rows:
            values = row.values()
            writer.writerow(
                ["" if value is None else repr(value) if isinstance(value, float) else value for value in values]
            )


def draw_pictures(
    directory: Path,
    answers: TaskAnswers,
    slides: Sequence[SlideEntry],
    rows: Sequence[Mapping[str, Any]],
    split: str,
    prefix: str = "",
) -> tuple[dict[str, Path], RiskGroups | None]:
    """Draw the task's picture of the slides that have a target: predictions over values, or survival by risk group.

    Args:
        directory: where to.
        answers: the model's.
        slides: N.
        rows: `prediction_rows` of the same slides.
        split: theirs.
        prefix: what the files' names begin with.

    Returns:
        The pictures by what they show, and of survival how its groups differ.
    """
    # Here, because they need matplotlib, which a training asks for at its end alone.
    from ds_wsi.evaluation.task_metrics.plots import draw_kaplan_meier, draw_scatter

    task = answers.task
    labelled_rows = [index for index, slide in enumerate(slides) if slide.is_labelled]
    if not labelled_rows:
        return {}, None
    if task.kind == "regression":
        (name,) = task.columns
        pairs = [(rows[index][name], rows[index][f"{name}_predicted"]) for index in labelled_rows]
        targets, predicted = zip(*pairs, strict=True)
        path = directory / f"{prefix}{SCATTER}.png"
        draw_scatter(targets, predicted, path, name=name)
        return {SCATTER: path}, None
    if task.kind != "survival" or answers.fitted.cutoffs is None:
        return {}, None
    some = [slides[index] for index in labelled_rows]
    risks = [rows[index][f"{task.columns[0]}_risk"] for index in labelled_rows]
    of_patients, means, _ = per_patient(follow_up_of(some), risks, [slide.patient_id for slide in some])
    groups = compare_risk_groups(of_patients, means, answers.fitted.cutoffs, split=split)
    path = directory / f"{prefix}{CURVES}.png"
    note = group_words(groups)
    draw_kaplan_meier(groups.curves, path, time_unit=task.time_unit, counted="patients", note=note)
    write_rows(directory / f"{prefix}{CURVES}.csv", curve_rows(groups.curves))
    return {CURVES: path}, groups


def group_words(groups: RiskGroups) -> list[str]:
    """How the groups differ, a line each; the cut-offs are the training split's."""
    test, ratio = groups.test, groups.ratio
    told = test.reason or f"chi-squared {test.statistic:.3f}, p {test.p_value:.4g}"
    lines = [f"log-rank test: {told}"]
    if math.isnan(ratio.ratio):
        return [*lines, f"hazard ratio: {ratio.reason}"]
    interval = ratio.reason or f"{100 * ratio.confidence:g}% interval {ratio.low:.3g} to {ratio.high:.3g}"
    return [*lines, f"hazard ratio of the highest against the lowest: {ratio.ratio:.3g}, {interval}"]
