"""Tables of many runs, as CSV, Markdown, LaTeX and HTML."""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ds_wsi.evaluation.comparison import PREFIX, read_predictions
from ds_wsi.evaluation.grouping import FinishedRun, build_tables
from ds_wsi.evaluation.metrics import METRIC_NAMES
from ds_wsi.evaluation.record import FILE_NAME, MARK_NAME, RunFolderError, RunRecord, read_metrics
from ds_wsi.evaluation.table_formats import CSV_COLUMNS, to_csv, to_html, to_latex, to_markdown
from ds_wsi.evaluation.task_metrics.table import CHOOSING, MEAN
from ds_wsi.evaluation.tasks.told import read_told, told_task
from ds_wsi.runtime.files import write_text
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.own_files import begins_with, require_ours
from ds_wsi.runtime.temporary import remove_left_behind

FILES = ("results.csv", "results.md", "results.tex", "results.html")
DEFAULT_METRICS = ("auc", "accuracy", "quadratic_weighted_kappa")  # after the one that chose the models
SAME_PROBABILITY = 1e-4  # of one model on other processes, or another device


@dataclass(frozen=True)
class CollectedRuns:
    """The finished runs, and (folder, reason) of each folder that is not one."""

    runs: tuple[FinishedRun, ...]
    skipped: tuple[tuple[Path, str], ...]


def collect_runs(run_dirs: Iterable[str | Path]) -> CollectedRuns:
    """Read the folders of runs; one that is unfinished or torn is set aside with the reason, and logged.

    Args:
        run_dirs: folders that training or `ds-wsi evaluate` wrote, or a protocol, which stands for its runs' folders;
            a folder named twice is read once.
    """
    runs: list[FinishedRun] = []
    skipped: list[tuple[Path, str]] = []
    for path in dict.fromkeys(run for given in run_dirs for run in _runs_of(Path(given).resolve())):
        try:
            task = _task_words(path)
            runs.append(FinishedRun(path, RunRecord.read(path), _metrics(path), _classes(path), task))
        except RunFolderError as error:
            logger.warning("run left out: %s: %s", path, error)
            skipped.append((path, str(error)))
    kept: dict[str, list[FinishedRun]] = {}
    for run in runs:
        alike = kept.setdefault(_identity(run), [])
        first = next((other for other in alike if _predicts_the_same(other, run)), None)
        if first is None:
            alike.append(run)
            continue
        reason = f"the same model on the same slides as {first.path}"
        logger.warning("run left out: %s: %s", run.path, reason)
        skipped.append((run.path, reason))
    left = {path for path, _ in skipped}
    return CollectedRuns(tuple(run for run in runs if run.path not in left), tuple(skipped))


def _task_words(path: Path) -> str:
    """A run's task, where it is no classification.

    Raises:
        RunFolderError: its predictions are not whole.
    """
    if told_task(path) is None:
        return ""
    try:
        told = read_told(path)
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"torn: {error}") from error
    return ", ".join(target.words for target in told.targets)


def _identity(run: FinishedRun) -> str:
    """What a model's run and its evaluation on the same slides share."""
    return json.dumps([asdict(run.record), run.classes, run.task], sort_keys=True)


def _predicts_the_same(a: FinishedRun, b: FinishedRun) -> bool:
    """Whether two runs tell the same slides the same probabilities; of another task the same answers."""
    if a.task:
        return read_told(a.path).answers_as(read_told(b.path), SAME_PROBABILITY)
    of_a, of_b = read_predictions(a.path), read_predictions(b.path)
    if sorted(of_a.slide_ids) != sorted(of_b.slide_ids):
        return False
    places = {slide_id: row for row, slide_id in enumerate(of_b.slide_ids)}
    return bool(
        np.abs(of_a.probabilities - of_b.probabilities[[places[name] for name in of_a.slide_ids]]).max()
        <= SAME_PROBABILITY
    )


def _classes(path: Path) -> tuple[str, ...]:
    """The classes, in the order of the probabilities: metrics.json of earlier versions does not name them."""
    with (path / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return tuple(name.removeprefix(PREFIX) for name in next(csv.reader(file), []) if name.startswith(PREFIX))


def _runs_of(path: Path) -> list[Path]:
    """The folders of a protocol's runs; any other folder itself."""
    if (path / FILE_NAME).is_file() or not path.is_dir():
        return [path]
    marks = (FILE_NAME, MARK_NAME)
    return [child for child in sorted(path.iterdir()) if any((child / mark).is_file() for mark in marks)] or [path]


def _metrics(path: Path) -> dict[str, float]:
    metrics = read_metrics(path)
    return {name: math.nan if entry["value"] is None else float(entry["value"]) for name, entry in metrics.items()}


def write_tables(run_dirs: Sequence[Path], output_dir: Path, metrics: Sequence[str] | None = None) -> str:
    """Write results.csv, results.md, results.tex and results.html over the runs, and return the Markdown.

    Runs are grouped by dataset, method, training and evaluation; where runs of a group differ in other settings, each
    variant is a row of its own. Runs no collective: one process calls it.

    Args:
        run_dirs: see `collect_runs`; unfinished and torn ones are listed with the reason, and take no part.
        output_dir: where the files go.
        metrics: names, in the order of the columns; by default AUC, accuracy and QWK after the metric that chose the
            most of the models, and of another task its own.

    Raises:
        ValueError: an unknown metric, no finished run at all, two runs with the same seed and split in one cell, or
            files of these names that this program did not write.
    """
    collected = collect_runs(run_dirs)
    names = dict.fromkeys((*METRIC_NAMES, *(name for run in collected.runs for name in run.metrics)))
    as_written = {name.lower(): name for name in names}
    metrics = None if metrics is None else [as_written.get(name.lower(), name) for name in metrics]
    unknown = [name for name in metrics or () if name not in names]
    if unknown:
        raise ValueError(f"metric must be one of {', '.join(names)}, got {unknown[0]!r}")
    if not collected.runs:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in collected.skipped) or "no folder was given"
        raise ValueError(f"at least one run must be finished, got none ({reasons})")
    tables = [
        table
        for of_task in _by_task(collected.runs)
        if (shown := _shown(of_task, metrics))
        for table in build_tables(of_task, shown)
    ]
    if not tables:
        raise ValueError(f"metric must be one of a run given, got {', '.join(metrics or ())}")
    output_dir = Path(output_dir)
    for name in FILES:  # all of them are written together, and the CSV's heading is ours alone
        require_ours(output_dir / name, lambda path: _is_csv_of_ours(path.with_name(FILES[0])), "the tables' folder")
    remove_left_behind(output_dir)
    markdown = to_markdown(tables, collected.skipped)
    write_text(output_dir / "results.csv", to_csv(tables))
    write_text(output_dir / "results.md", markdown)
    write_text(output_dir / "results.tex", to_latex(tables, collected.skipped))
    write_text(output_dir / "results.html", to_html(tables, collected.skipped))
    return markdown


def _by_task(runs: Sequence[FinishedRun]) -> list[list[FinishedRun]]:
    """The runs of each task, classification first."""
    tasks = sorted({run.task for run in runs})
    return [[run for run in runs if run.task == task] for task in tasks]


def _shown(runs: Sequence[FinishedRun], metrics: Sequence[str] | None) -> tuple[str, ...]:
    """The metrics that are shown of runs of one task."""
    if not runs[0].task:
        return tuple(name for name in metrics or _default_metrics(runs) if name in METRIC_NAMES)
    there = [name for name in runs[0].metrics if all(name in run.metrics for run in runs)]
    if metrics:
        return tuple(name for name in metrics if name in there)
    return tuple(name for name in there if name == MEAN or name.rpartition(".")[2] in CHOOSING)


def _default_metrics(runs: Sequence[FinishedRun]) -> tuple[str, ...]:
    counts = Counter(str(run.record.settings.get("metric_for_best_model")) for run in runs)
    chose = [name for name, _ in counts.most_common(1) if name in METRIC_NAMES]
    return tuple(dict.fromkeys((*chose, *DEFAULT_METRICS)))


def _is_csv_of_ours(path: Path) -> bool:
    return begins_with(path, ",".join(CSV_COLUMNS) + "\n")
