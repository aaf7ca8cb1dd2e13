"""Runs grouped for a table: dataset by method by training, with mean and standard deviation over seeds and folds."""

import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TypeVar

from ds_wsi.evaluation.record import RunRecord
from ds_wsi.evaluation.task_metrics.table import LOWER_IS_BETTER

BASELINE, END_TO_END = "frozen", "end to end"
TRAININGS = (BASELINE, "partly frozen", END_TO_END)  # the order of the columns

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, what it was, its test metrics (name -> value, NaN where undefined), its classes in order.

    `task` is another task than classification in words; "" of classification.
    """

    path: Path
    record: RunRecord
    metrics: Mapping[str, float]
    classes: tuple[str, ...] = ()
    task: str = ""


@dataclass(frozen=True)
class Statistic:
    """A metric over the runs of a cell.

    Attributes:
        mean: over the runs that define the metric; NaN where none does.
        std: sample standard deviation (n - 1); NaN of fewer than two runs.
        n: runs that define the metric.
    """

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class Cell:
    """Runs of one dataset, method, training, evaluation and settings, and their statistics by metric."""

    runs: tuple[FinishedRun, ...]
    statistics: Mapping[str, Statistic]


@dataclass(frozen=True)
class Row:
    """A line of a table: a method under one evaluation and one variant of the settings; training -> cell."""

    method: str
    protocol: str
    variant: str
    cells: Mapping[str, Cell]

    def difference(self, metric: str) -> float:
        """Mean end to end minus mean frozen; NaN where either is missing."""
        if BASELINE not in self.cells or END_TO_END not in self.cells:
            return math.nan
        return self.cells[END_TO_END].statistics[metric].mean - self.cells[BASELINE].statistics[metric].mean


@dataclass(frozen=True)
class Table:
    """The rows of one dataset."""

    dataset: str
    metrics: tuple[str, ...]
    trainings: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def has_difference(self) -> bool:
        """Whether any row has a baseline to be compared with."""
        return any(BASELINE in row.cells and END_TO_END in row.cells for row in self.rows)

    def is_best(self, row: Row, training: str, metric: str) -> bool:
        """Whether the cell's mean is the best of the dataset under the row's evaluation: of errors the lowest."""
        sign = -1 if is_error(metric) else 1
        means = [
            sign * cell.statistics[metric].mean
            for other in self.rows
            if other.protocol == row.protocol
            for cell in other.cells.values()
        ]
        defined = [mean for mean in means if not math.isnan(mean)]
        candidate = sign * row.cells[training].statistics[metric].mean
        return len(defined) > 1 and candidate >= max(defined) - 1e-12  # the same mean, summed in another order


def is_error(metric: str) -> bool:
    """Whether lower is better of a metric, alone or TARGET.METRIC."""
    return metric.rpartition(".")[2] in LOWER_IS_BETTER


def build_tables(runs: Sequence[FinishedRun], metrics: Sequence[str]) -> tuple[Table, ...]:
    """One table per dataset, in the order of their names; rows by method, evaluation, order of the classes and variant.

    Runs are of one task, whose words stand behind the dataset's name where it is no classification.

    Raises:
        ValueError: two runs with the same seed and split in one cell.
    """
    by_dataset = _grouped(runs, lambda run: run.record.dataset)
    tables = []
    for dataset in sorted(by_dataset):
        by_row = _grouped(by_dataset[dataset], lambda run: (run.record.method, run.record.protocol, run.classes))
        several = len({run.classes for run in by_dataset[dataset]}) > 1
        rows = [
            row
            for (method, protocol, classes), group in sorted(by_row.items(), key=lambda item: item[0])
            for row in _rows(method, protocol, f"classes {', '.join(classes)}" if several else "", group, metrics)
        ]
        occurring = {training for row in rows for training in row.cells}
        trainings = [name for name in TRAININGS if name in occurring] + sorted(occurring - set(TRAININGS))
        task = by_dataset[dataset][0].task
        tables.append(Table(f"{dataset}, {task}" if task else dataset, tuple(metrics), tuple(trainings), tuple(rows)))
    return tuple(tables)


def _grouped(runs: Iterable[FinishedRun], key: Callable[[FinishedRun], Key]) -> dict[Key, list[FinishedRun]]:
    groups: dict[Key, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def _rows(method: str, protocol: str, classes: str, runs: list[FinishedRun], metrics: Sequence[str]) -> list[Row]:
    """A row per variant; a training without variants, such as the one frozen baseline, stands in each.

    `classes` begins the variant's words: kappa and f1 are other metrics where the classes come in another order.
    """
    by_training = {
        training: _variants(group) for training, group in _grouped(runs, lambda run: run.record.training).items()
    }
    names = sorted({name for variants in by_training.values() for name in variants if name})
    rows = []
    for name in names or [""]:
        chosen = {training: variants.get(name, variants.get("")) for training, variants in by_training.items()}
        cells = {training: _cell(group, metrics) for training, group in chosen.items() if group}
        rows.append(Row(method, protocol, "; ".join(words for words in (classes, name) if words), cells))
    return rows


def _variants(runs: list[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Runs by the settings in which they differ, in words; all under "" where they differ in none."""
    names = sorted({name for run in runs for name in run.record.settings})
    differing = [name for name in names if len({json.dumps(run.record.settings.get(name)) for run in runs}) > 1]
    return _grouped(
        runs, lambda run: ", ".join(f"{option_name(name)} {run.record.settings.get(name)}" for name in differing)
    )


_OPTION_NAMES = {
    "slides_per_step": "bags_per_step",
    "compression.hook": "comm_hook",
    "compression.keep": "comm_keep",
    "early_stopping": "early_stopping_patience",
    "from_tile_store": "tile_store",
}


def option_name(setting: str) -> str:
    """A setting of a record under its option's name."""
    group, _, name = setting.rpartition(".")
    return _OPTION_NAMES.get(setting, f"augment_{name}" if group == "augment" else name)


def _cell(runs: list[FinishedRun], metrics: Sequence[str]) -> Cell:
    for (seed, split), same in _grouped(runs, lambda run: (run.record.seed, run.record.split)).items():
        if len(same) > 1:
            raise ValueError(
                f"runs of one cell must differ in seed or split, got seed {seed}, split {split!r} in "
                f"{same[0].path} and {same[1].path}. HINT: leave one of them out; runs of other splits are told apart "
                "where they are trained, by `ds-wsi train --split_name`."
            )
    return Cell(tuple(runs), {metric: _statistic([run.metrics[metric] for run in runs]) for metric in metrics})


def _statistic(values: Sequence[float]) -> Statistic:
    defined = [value for value in values if not math.isnan(value)]
    return Statistic(
        fmean(defined) if defined else math.nan, stdev(defined) if len(defined) > 1 else math.nan, len(defined)
    )
