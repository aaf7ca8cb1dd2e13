"""What a run's folder tells of a task other than classification: targets and predictions of slides, and their metrics.

Metrics are computed of predictions.csv alone. Of survival that is Harrell's C: others need the training split.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ds_wsi.evaluation.bootstrap import Measure
from ds_wsi.evaluation.metrics import FloatArray, IntArray
from ds_wsi.evaluation.task_metrics.concordance import weighted_harrell_c
from ds_wsi.evaluation.task_metrics.follow_up import follow_up
from ds_wsi.evaluation.task_metrics.multilabel import weighted_multilabel_metrics
from ds_wsi.evaluation.task_metrics.ordinal import weighted_ordinal_metrics
from ds_wsi.evaluation.task_metrics.regression import weighted_regression_metrics
from ds_wsi.evaluation.task_metrics.table import default_metric
from ds_wsi.evaluation.tasks.several import PartMeasure, measured
from ds_wsi.runtime.files import read_object

Row = Mapping[str, str]


@dataclass(frozen=True)
class ToldTarget:
    """A target of a run's folder, as metrics.json names it.

    Attributes:
        name: the name among several; "" alone.
        kind: the kind of task.
        columns: the table's.
        classes: grades in their order, or the labels' names.
    """

    name: str
    kind: str
    columns: tuple[str, ...]
    classes: tuple[str, ...]

    @property
    def words(self) -> str:
        """What is asked, with the grades in their order."""
        grades = f" ({' < '.join(self.classes)})" if self.kind == "ordinal" else ""
        return f"{self.kind} of {' and '.join(self.columns)}{grades}"

    @property
    def target_columns(self) -> tuple[str, ...]:
        """The columns of predictions.csv that hold the target."""
        if self.kind == "survival":
            return self.columns[0], f"{self.columns[0]}_event"
        return self.columns

    @property
    def predicted_columns(self) -> tuple[str, ...]:
        """The columns of predictions.csv that metrics are computed of."""
        ending = {"survival": "risk", "multilabel": "probability"}.get(self.kind, "predicted")
        names = self.columns if self.kind == "multilabel" else self.columns[:1]
        return tuple(f"{name}_{ending}" for name in names)

    def is_labelled(self, row: Row) -> bool:
        """Whether a slide has the target."""
        return any(row.get(name) for name in self.target_columns)

    def measure(self, rows: Sequence[Row]) -> Measure:
        """The metrics of slides, each of which has the target, for counts [R, N]."""
        targets = [[row[name] for name in self.target_columns] for row in rows]
        predicted = [[row[name] for name in self.predicted_columns] for row in rows]
        if self.kind == "ordinal":
            grades, decided = ([self.classes.index(row[0]) for row in each] for each in (targets, predicted))
            return partial(weighted_ordinal_metrics, np.array(grades), np.array(decided), len(self.classes))
        numbers = np.array([[float(text or "nan") for text in row] for row in targets])
        answers = np.array([[float(text) for text in row] for row in predicted])
        if self.kind == "multilabel":
            return partial(weighted_multilabel_metrics, numbers, answers, self.classes)
        if self.kind == "regression":
            return partial(weighted_regression_metrics, numbers[:, 0], answers[:, 0])
        of_slides = follow_up(numbers[:, 0], numbers[:, 1])

        def concordance(counts: IntArray) -> Mapping[str, FloatArray]:
            return {"c_index": weighted_harrell_c(of_slides, answers[:, 0], counts)}

        return concordance


@dataclass(frozen=True)
class Told:
    """A run's predictions.

    Attributes:
        source: the file.
        targets: one, or several.
        rows: the rows of predictions.csv that have a target.
    """

    source: Path
    targets: tuple[ToldTarget, ...]
    rows: tuple[Row, ...]

    @property
    def predicted_columns(self) -> tuple[str, ...]:
        """The columns of predictions.csv that metrics are computed of."""
        return tuple(name for target in self.targets for name in target.predicted_columns)

    @property
    def target_columns(self) -> tuple[str, ...]:
        """The columns of predictions.csv that hold targets."""
        return tuple(name for target in self.targets for name in target.target_columns)

    def answers_as(self, other: "Told", tolerance: float) -> bool:
        """Whether another run answers the same slides the same, numbers to a tolerance."""
        rows = {row["slide_id"]: row for row in other.rows}
        if self.targets != other.targets or {row["slide_id"] for row in self.rows} != set(rows):
            return False
        pairs = ((row[name], rows[row["slide_id"]][name]) for row in self.rows for name in self.predicted_columns)
        return all(one == two or abs(_number(one) - _number(two)) <= tolerance for one, two in pairs)

    def measure(self, rows: Sequence[Row]) -> Measure:
        """The metrics of rows for counts [R, N]; of several targets TARGET.METRIC, and the mean of their first."""
        if not self.targets[0].name:
            return self.targets[0].measure(rows)
        parts = []
        for target in self.targets:
            labelled_rows = [index for index, row in enumerate(rows) if target.is_labelled(row)]
            of_target_rows = [rows[index] for index in labelled_rows]
            if labelled_rows:
                first = default_metric(target.kind).name
                parts.append(PartMeasure(target.name, first, np.array(labelled_rows), target.measure(of_target_rows)))
        return partial(measured, parts)


def _number(text: str) -> float:
    """A number; NaN of a word."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def told_task(directory: Path) -> Mapping[str, Any] | None:
    """The task of a folder's metrics.json; None of classification, or without the file."""
    path = directory / "metrics.json"
    task: Mapping[str, Any] | None = read_object(path, path.name).get("task") if path.is_file() else None
    return task


def read_told(directory: Path) -> Told:
    """Read a folder whose task is another than classification.

    Raises:
        ValueError: files are missing, or hold what no prediction can be.
    """
    path = directory / "predictions.csv"
    if not path.is_file():
        raise ValueError(f"a run's folder must hold predictions.csv, got none at {path}. HINT: is the run finished?")
    metrics = read_object(directory / "metrics.json", "metrics.json")
    task = metrics["task"]
    entries = task.get("targets") or [{**task, "name": "", "classes": metrics["classes"]}]
    targets = tuple(
        ToldTarget(entry["name"], entry["kind"], tuple(entry["columns"]), tuple(entry["classes"])) for entry in entries
    )
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        header, rows = list(reader.fieldnames or ()), list(reader)
    if "slide_ids" in header:  # a row is a patient's
        header, rows = ["slide_id", *header], [{"slide_id": row["patient_id"], **row} for row in rows]
    told = Told(path, targets, tuple(row for row in rows if any(target.is_labelled(row) for target in targets)))
    missing = [name for name in ("slide_id", "patient_id", *told.predicted_columns) if name not in header]
    if missing or not told.rows:
        raise ValueError(
            f"predictions.csv must have slides with a target and the columns {', '.join(told.predicted_columns)}, got "
            f"{', '.join(header)} ({path}). HINT: write it again with `ds-wsi evaluate`."
        )
    return told
