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
from ds_wsi.runtime.files import read_object, write_text
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
            _require_classes(path)
            runs.append(FinishedRun(path, RunRecord.read(path), _metrics(path), _classes(path)))
        except RunFolderError as error:
            logger.warning("run left out: %s: %s", path, error)
            skipped.append((path, str(error)))
    kept: dict[str, list[FinishedRun]] = {}
    for run in runs:
        alike = kept.setdefault(_identity(run), [])
        first = next((other for other in alike if _predicts_the_same(other.path, run.path)), None)
        if first is None:
            alike.append(run)
            continue
        reason = f"the same model on the same slides as {first.path}"
        logger.warning("run left out: %s: %s", run.path, reason)
        skipped.append((run.path, reason))
    left = {path for path, _ in skipped}
    return CollectedRuns(tuple(run for run in runs if run.path not in left), tuple(skipped))


def _require_classes(path: Path) -> None:
    """Refuse a run of another task: its metrics are others.

    Raises:
        RunFolderError: names the task.
    """
    metrics = path / "metrics.json"
    task = read_object(metrics, metrics.name).get("task") if metrics.is_file() else None
    if task is not None:
        raise RunFolderError(f"tables are of classification, and its task is {task['kind']}")


def _identity(run: FinishedRun) -> str:
    """What a model's run and its evaluation on the same slides share."""
    return json.dumps([asdict(run.record), run.classes], sort_keys=True)


def _predicts_the_same(a: Path, b: Path) -> bool:
    """Whether two runs tell the same slides the same probabilities."""
    of_a, of_b = read_predictions(a), read_predictions(b)
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
        metrics: names of METRIC_NAMES, in the order of the columns; by default AUC, accuracy and QWK after the metric
            that chose the most of the models.

    Raises:
        ValueError: an unknown metric, no finished run at all, two runs with the same seed and split in one cell, or
            files of these names that this program did not write.
    """
    unknown = [name for name in metrics or () if name not in METRIC_NAMES]
    if unknown:
        raise ValueError(f"metric must be one of {', '.join(METRIC_NAMES)}, got {unknown[0]!r}")
    collected = collect_runs(run_dirs)
    if not collected.runs:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in collected.skipped) or "no folder was given"
        raise ValueError(f"at least one run must be finished, got none ({reasons})")
    tables = build_tables(collected.runs, tuple(metrics or _default_metrics(collected.runs)))
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


def _default_metrics(runs: Sequence[FinishedRun]) -> tuple[str, ...]:
    counts = Counter(str(run.record.settings.get("metric_for_best_model")) for run in runs)
    chose = [name for name, _ in counts.most_common(1) if name in METRIC_NAMES]
    return tuple(dict.fromkeys((*chose, *DEFAULT_METRICS)))


def _is_csv_of_ours(path: Path) -> bool:
    return begins_with(path, ",".join(CSV_COLUMNS) + "\n")
