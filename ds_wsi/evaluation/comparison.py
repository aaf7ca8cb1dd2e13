"""Two models on the same slides: DeLong's test of the AUCs; a paired bootstrap and an exchange test of every metric."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ds_wsi.evaluation.bootstrap import (
    SAME,
    Measure,
    check_resampling,
    percentile_interval,
    resample_metrics,
    weighted_metrics,
)
from ds_wsi.evaluation.delong import DeLong, delong
from ds_wsi.evaluation.metrics import METRIC_NAMES, FloatArray, IntArray, check_predictions, slide_metrics
from ds_wsi.evaluation.protocol import EvaluationProtocol
from ds_wsi.evaluation.record import FILE_NAME as RECORD
from ds_wsi.evaluation.record import RunFolderError, RunRecord
from ds_wsi.evaluation.task_metrics.table import LOWER_IS_BETTER
from ds_wsi.runtime.files import json_number, read_object
from ds_wsi.runtime.words import some

SHOWN_SLIDES = 5  # in messages
MAX_EXACT = 12  # patients that differ: up to 4,096 exchanges are tried one by one, more are drawn
COLUMNS = ("slide_id", "patient_id", "label")
PREFIX = "probability_"


@dataclass(frozen=True)
class Predictions:
    """A run's predictions, as its predictions.csv holds them.

    Attributes:
        source: the file.
        classes: their names, in the order of the probabilities.
        slide_ids, patient_ids: N each; of bags of patients the patients are both.
        labels: int64 [N].
        probabilities: float64 [N, C]; of several draws of tiles the mean.
        protocol: the tiles that were predicted on, in words.
    """

    source: Path
    classes: tuple[str, ...]
    slide_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    labels: IntArray
    probabilities: FloatArray
    protocol: str


@dataclass(frozen=True)
class Difference:
    """A metric of two models on the same slides, and the paired bootstrap of B minus A.

    Attributes:
        a, b, difference: values on the slides themselves; NaN where undefined.
        low, high: the difference's percentile interval; NaN where all resamples agree.
        p_value: two-sided, of an exchange test: see `exchange_test`.
        n_resamples_used: resamples on which both are defined.
    """

    a: float
    b: float
    difference: float
    low: float
    high: float
    p_value: float
    n_resamples_used: int


@dataclass(frozen=True)
class Comparison:
    """What `compare_runs` found; `protocols` are A's and B's, `delong` is None for more than two classes.

    Attributes:
        n_differing: patients of whom the two models' probabilities differ.
        smallest_p: the smallest p-value that so few exchanges can give.
    """

    protocols: tuple[str, str]
    n_slides: int
    n_patients: int
    n_differing: int
    smallest_p: float
    confidence: float
    metrics: Mapping[str, Difference]
    delong: DeLong | None


def read_predictions(directory: str | Path) -> Predictions:
    """Read the predictions.csv of a run's folder.

    Raises:
        ValueError: the file is missing, lacks columns, or holds what no prediction can be; names the slide.
    """
    path = Path(directory) / "predictions.csv"
    if not path.is_file():
        raise ValueError(f"a run's folder must hold predictions.csv, got none at {path}. HINT: is the run finished?")
    if (path.parent / RECORD).is_file():
        try:
            RunRecord.read(path.parent)
        except RunFolderError as error:
            raise ValueError(
                f"a run's results must be as they were written, got {error} ({path.parent}). HINT: write them again "
                "with `ds-wsi evaluate`."
            ) from error
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or ())
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"predictions.csv must be a table in UTF-8, got {error} ({path}). HINT: write it again with "
            "`ds-wsi evaluate`."
        ) from error
    classes = tuple(name.removeprefix(PREFIX) for name in header if name.startswith(PREFIX))
    bag = "patient_id" if "slide_ids" in header else "slide_id"  # what a row is of
    missing = [name for name in COLUMNS if name not in (*header, *(["slide_id"] if bag == "patient_id" else []))]
    if missing or len(classes) < 2:
        raise ValueError(
            f"predictions.csv must have the columns {', '.join(COLUMNS)} and {PREFIX}<class> of each class, "
            f"got {', '.join(header)} ({path}). HINT: write it again with `ds-wsi evaluate`."
        )
    slide_ids = tuple(row[bag] for row in rows)
    try:
        labels = [classes.index(row["label"]) for row in rows]
        probabilities = [[float(row[PREFIX + name]) for name in classes] for row in rows]
    except (ValueError, TypeError) as error:
        raise ValueError(f"predictions.csv must hold class names and numbers, got {error} ({path})") from error
    if len(set(slide_ids)) < len(slide_ids):
        twice = next(name for name in slide_ids if slide_ids.count(name) > 1)
        raise ValueError(f"predictions.csv must hold each slide once, got {twice} more than once ({path})")
    checked = check_predictions(np.array(labels, dtype=np.int64), np.array(probabilities), slide_ids)
    patient_ids = tuple(row["patient_id"] for row in rows)
    return Predictions(path, classes, slide_ids, patient_ids, *checked, protocol_words(path.with_name("metrics.json")))


def protocol_words(path: Path) -> str:
    """The tiles that a metrics.json tells its predictions to be on."""
    if not path.is_file():
        return f"unknown tiles (no {path.name})"
    try:
        protocol = EvaluationProtocol(**read_object(path, path.name)["evaluation"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"metrics.json must tell how the model was evaluated, got {error} ({path}). HINT: write it again with "
            "`ds-wsi evaluate`."
        ) from error
    return str(protocol) if protocol.runs == 1 else f"{protocol}, their mean probabilities"


def compare_predictions(
    a: Predictions, b: Predictions, n_resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Comparison:
    """Compare two models' predictions of the same slides, which may come in another order.

    The bootstrap draws patients with all their slides, with replacement, the same ones for both models. DeLong's test
    takes slides as independent: where patients have several, its p-value is too small.

    Args:
        a, b: the predictions.
        n_resamples, seed: the bootstrap's.
        confidence: the intervals' level, in (0, 1).

    Raises:
        ValueError: other classes, slides, labels or patients; names them.
    """
    check_resampling(n_resamples, confidence)
    order = _matching_rows(a, b)
    scores = (a.probabilities, b.probabilities[order])
    values = [slide_metrics(a.labels, each) for each in scores]
    samples = [resample_metrics(a.labels, [each], a.patient_ids, n_resamples, seed) for each in scores]
    p_values, n_differing, smallest_p = exchange_test(a.labels, scores, a.patient_ids, n_resamples, seed)
    metrics = {
        name: difference_of(
            values[0][name], values[1][name], samples[1][name] - samples[0][name], p_values[name], confidence
        )
        for name in METRIC_NAMES
    }
    test = delong(a.labels == 1, scores[0][:, 1], scores[1][:, 1], confidence) if len(a.classes) == 2 else None
    counts = len(a.labels), len(set(a.patient_ids)), n_differing
    return Comparison((a.protocol, b.protocol), *counts, smallest_p, confidence, metrics, test)


def exchange_test(
    labels: IntArray, scores: tuple[FloatArray, FloatArray], patients: Sequence[str], n_drawn: int = 2000, seed: int = 0
) -> tuple[dict[str, float], int, float]:
    """Test whether it matters which of two models is which: a permutation test of each metric's difference.

    Were the models alike, each patient's two sets of predictions could be exchanged. All exchanges are tried of up to
    MAX_EXACT patients whose predictions differ, and then the test is exact; of more, `n_drawn` are drawn. The p-value
    is the share of exchanges, the one at hand among them, whose difference is as large. Resampling slides would give
    p-values below 0.01 for four of them.

    Args:
        labels: int64 [N].
        scores: two of float64 [N, C].
        patients: N names; a patient's slides are exchanged together.
        n_drawn, seed: how many exchanges are drawn, and by which seed.

    Returns:
        METRIC_NAMES -> p-value, NaN where a metric is undefined; how many patients differ; the smallest p-value that
        any difference could have had.

    Source: Good, Permutation, Parametric and Bootstrap Tests of Hypotheses (2005), chapter 3; Phipson and Smyth,
    Statistical Applications in Genetics and Molecular Biology 9 (2010), for the share of drawn ones.
    """
    differs = (scores[0] != scores[1]).any(axis=1)
    measure = partial(weighted_metrics, np.concatenate([labels, labels]), np.concatenate(scores))
    return exchange_rows(measure, differs, patients, n_drawn, seed)


def exchange_rows(
    measure: Measure, differs: npt.NDArray[np.bool_], patients: Sequence[str], n_drawn: int, seed: int
) -> tuple[dict[str, float], int, float]:
    """Do as `exchange_test` does, of any metrics.

    Args:
        measure: counts [R, 2 N] of the rows of one model, then the other's -> metrics [R].
        differs: bool [N], whether the models' predictions do.
        patients, n_drawn, seed: see `exchange_test`.
    """
    names = list(dict.fromkeys(name for name, is_one in zip(patients, differs, strict=True) if is_one))
    exact = len(names) <= MAX_EXACT
    if exact:  # row 0 exchanges nobody
        exchanged = (np.arange(2 ** len(names))[:, None] >> np.arange(len(names))) & 1
    else:
        drawn = np.random.default_rng(seed).integers(2, size=(n_drawn, len(names)))
        exchanged = np.concatenate([np.zeros((1, len(names)), dtype=drawn.dtype), drawn])
    number = {name: column for column, name in enumerate(names)}
    columns = np.array([number.get(name, len(names)) for name in patients])
    padded = np.concatenate([exchanged, np.zeros((len(exchanged), 1), dtype=exchanged.dtype)], axis=1)
    of_second = padded[:, columns].astype(np.int64)  # [exchanges, N]: which rows the first model gets from the second
    first = measure(np.concatenate([1 - of_second, of_second], axis=1))
    second = measure(np.concatenate([of_second, 1 - of_second], axis=1))
    p_values = {}
    for name in first:
        differences = np.abs(second[name] - first[name])
        defined = differences[np.isfinite(differences)]
        p_values[name] = math.nan if math.isnan(differences[0]) else float(np.mean(defined >= differences[0] - SAME))
    return p_values, len(names), 2 / 2 ** len(names) if exact and names else 1.0 if exact else 1 / len(exchanged)


def _matching_rows(a: Predictions, b: Predictions) -> IntArray:
    """The rows of `b` in the order of `a`."""
    where = f"({a.source} and {b.source})"
    if a.classes != b.classes:
        raise ValueError(f"both runs must have the same classes, got {a.classes} and {b.classes} {where}")
    rows = {slide: row for row, slide in enumerate(b.slide_ids)}
    only_a, only_b = [name for name in a.slide_ids if name not in rows], sorted(set(b.slide_ids) - set(a.slide_ids))
    if only_a or only_b:
        parts = [
            f"{some(names, SHOWN_SLIDES)} only in {each.source}" for names, each in ((only_a, a), (only_b, b)) if names
        ]
        raise ValueError(
            f"both runs must have predicted the same slides, got {' and '.join(parts)}. "
            "HINT: evaluate both on one manifest with `ds-wsi evaluate`."
        )
    order = np.array([rows[slide] for slide in a.slide_ids])
    for what, of_a, of_b in (
        ("label", [a.classes[label] for label in a.labels], [b.classes[label] for label in b.labels[order]]),
        ("patient", list(a.patient_ids), [b.patient_ids[row] for row in order]),
    ):
        differing = [
            f"{slide} ({one!r} and {two!r})"
            for slide, one, two in zip(a.slide_ids, of_a, of_b, strict=True)
            if one != two
        ]
        if differing:
            raise ValueError(
                f"both runs must have the same {what} for each slide, got {some(differing, SHOWN_SLIDES)} {where}"
            )
    return order


def difference_of(a: float, b: float, samples: FloatArray, p_value: float, confidence: float) -> Difference:
    """What is told of a metric of A and B, of the resamples of its difference, and of its exchanges."""
    interval = percentile_interval(b - a, samples, confidence)
    return Difference(a, b, b - a, interval.low, interval.high, p_value, interval.n_resamples_used)


def comparison_to_json(comparison: Comparison) -> dict[str, Any]:
    """Plain values for a JSON file; what is undefined is None."""
    test = comparison.delong
    return {
        "tiles_a": comparison.protocols[0],
        "tiles_b": comparison.protocols[1],
        "n_slides": comparison.n_slides,
        "n_patients": comparison.n_patients,
        "n_patients_that_differ": comparison.n_differing,
        "smallest_p_value_possible": comparison.smallest_p,
        "confidence": comparison.confidence,
        "difference": "b - a",
        "paired_bootstrap": {
            name: {key: json_number(value) for key, value in vars(measured).items()}
            for name, measured in comparison.metrics.items()
        },
        "delong": None
        if test is None
        else {
            key: [[json_number(value) for value in row] for row in measured.tolist()]
            if key == "covariance"
            else json_number(measured)
            for key, measured in vars(test).items()
        },
    }


def format_comparison(comparison: Comparison) -> str:
    """Lines of text for a terminal."""
    percent = f"{100 * comparison.confidence:g}%"
    width = max(map(len, comparison.metrics))
    lines = [
        f"A on {comparison.protocols[0]}; B on {comparison.protocols[1]}",
        f"{comparison.n_slides} slides of {comparison.n_patients} patients. B - A: interval by a paired bootstrap over "
        "patients, p by exchanging a patient's predictions",
        f"{'metric':<{width}}       A       B    B - A  {percent} interval      p",
    ]
    for name, metric in comparison.metrics.items():
        lines.append(
            f"{name:<{width}}  {_number(metric.a):>6}  {_number(metric.b):>6}  {_signed(metric.difference):>7}  "
            f"[{_signed(metric.low)}, {_signed(metric.high)}]  {_p(metric.p_value)}"
            f"{'  lower is better' if name.rpartition('.')[2] in LOWER_IS_BETTER else ''}"
        )
    if comparison.smallest_p > 1 - comparison.confidence:
        lines.append(
            f"too few slides to tell: the models differ on {comparison.n_differing} patients, and no p below "
            f"{comparison.smallest_p:.2g} is possible"
        )
    of_classes = set(comparison.metrics) == set(METRIC_NAMES)
    return "\n".join([*lines, *(_delong_lines(comparison, percent) if of_classes else [])])


def _delong_lines(comparison: Comparison, percent: str) -> list[str]:
    test = comparison.delong
    if test is None:
        return ["DeLong: of two classes only"]
    if math.isnan(test.p_value):
        return ["DeLong: undefined, the difference has no variance or a class fewer than two slides"]
    line = (
        f"DeLong: AUC {_number(test.auc_a)} and {_number(test.auc_b)}, difference {_signed(test.difference)} "
        f"({percent} [{_signed(test.low)}, {_signed(test.high)}]), z {test.z:.3f}, p {_p(test.p_value)}"
    )
    if comparison.n_patients == comparison.n_slides:
        return [line]
    return [line, "patients have several slides, which DeLong takes as independent: its p is too small, read the above"]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.3f}"


def _p(value: float) -> str:
    return "-" if math.isnan(value) else "<0.001" if value < 0.001 else f"{value:.3f}"
