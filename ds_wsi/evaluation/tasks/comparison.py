"""Two models of one task on the same slides: a paired bootstrap and an exchange test of every metric.

Of classification that is `evaluation.comparison`'s.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ds_wsi.evaluation.bootstrap import check_resampling, resample_measures
from ds_wsi.evaluation.comparison import (
    SHOWN_SLIDES,
    Comparison,
    compare_predictions,
    difference_of,
    exchange_rows,
    protocol_words,
    read_predictions,
)
from ds_wsi.evaluation.task_metrics.table import CHOOSING, MEAN
from ds_wsi.evaluation.tasks.told import Row, Told, read_told, told_task
from ds_wsi.runtime.words import some


def compare_runs(run_a: str | Path, run_b: str | Path, n_resamples: int = 2000, seed: int = 0) -> Comparison:
    """`compare_predictions` of two runs' folders; of another task than classification `compare_told`."""
    if any(told_task(Path(run)) is not None for run in (run_a, run_b)):
        return compare_told(Path(run_a), Path(run_b), n_resamples, seed=seed)
    return compare_predictions(read_predictions(run_a), read_predictions(run_b), n_resamples, seed=seed)


def compare_told(
    run_a: Path, run_b: Path, n_resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Comparison:
    """Compare two models' predictions of the same slides, which may come in another order.

    The bootstrap draws patients with all their slides, the same ones for both models.

    Args:
        run_a, run_b: the folders.
        n_resamples, seed: the bootstrap's.
        confidence: the intervals' level, in (0, 1).

    Raises:
        ValueError: other tasks, slides, targets or patients; names them.
    """
    check_resampling(n_resamples, confidence)
    for run in (run_a, run_b):
        if told_task(run) is None:
            raise ValueError(
                f"both runs must be of one task, got classification ({run}) and another. HINT: compare models that "
                "were asked the same."
            )
    a, b = read_told(run_a), read_told(run_b)
    first, second = a.rows, _matching_rows(a, b)
    patients = [row["patient_id"] for row in first]
    measures = [a.measure(rows) for rows in (first, second)]
    values = [measure(np.ones((1, len(first)), dtype=np.int64)) for measure in measures]
    samples = [resample_measures([measure], len(first), patients, n_resamples, seed) for measure in measures]
    differs = np.array([_predicted(a, one) != _predicted(a, two) for one, two in zip(first, second, strict=True)])
    p_values, n_differing, smallest = exchange_rows(a.measure([*first, *second]), differs, patients, n_resamples, seed)
    metrics = {}
    for name, of_a in values[0].items():
        if name == MEAN or _is_the_models(name):
            one, two, gaps = float(of_a[0]), float(values[1][name][0]), samples[1][name] - samples[0][name]
            metrics[name] = difference_of(one, two, gaps, p_values[name], confidence)
    protocols = protocol_words(run_a / "metrics.json"), protocol_words(run_b / "metrics.json")
    return Comparison(protocols, len(first), len(set(patients)), n_differing, smallest, confidence, metrics, None)


def _is_the_models(name: str) -> bool:
    """Whether a metric is better or worse: a label's prevalence is neither."""
    metric = name.rpartition(".")[2]
    return metric in CHOOSING or metric.startswith(("auc_", "ap_"))


def _predicted(told: Told, row: Row) -> list[float | str]:
    words = [row[name] for name in told.predicted_columns]
    return [_number(text) for text in words]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _matching_rows(a: Told, b: Told) -> Sequence[Row]:
    """The rows of `b` in the order of `a`."""
    where = f"({a.source} and {b.source})"
    if a.targets != b.targets:
        raise ValueError(f"both runs must be of one task, got {_words(a)} and {_words(b)} {where}")
    rows = {row["slide_id"]: row for row in b.rows}
    slides = [row["slide_id"] for row in a.rows]
    only = sorted(set(slides) ^ set(rows))
    if only:
        raise ValueError(
            f"both runs must have predicted the same slides, got {some(only, SHOWN_SLIDES)} in one alone {where}. "
            "HINT: evaluate both on one manifest with `ds-wsi evaluate`."
        )
    for what, names in (("target", a.target_columns), ("patient", ("patient_id",))):
        differing = [row["slide_id"] for row in a.rows if any(row[n] != rows[row["slide_id"]][n] for n in names)]
        if differing:
            raise ValueError(
                f"both runs must have the same {what} for each slide, got others of {some(differing, SHOWN_SLIDES)} "
                f"{where}"
            )
    return [rows[name] for name in slides]


def _words(told: Told) -> str:
    return ", ".join(target.words for target in told.targets)
