"""What a run leaves behind: metrics.json, predictions.csv, heat maps, curves and the report."""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_wsi.bags.cohort import Cohort
from ds_wsi.bags.slide_entry import NAMES, bag_names, bag_word, slides_of_rows
from ds_wsi.bags.summary import cohort_lines
from ds_wsi.evaluation.bootstrap import MetricInterval, bootstrap_metrics, format_table, metrics_to_json
from ds_wsi.evaluation.curves import draw_curves
from ds_wsi.evaluation.metrics import METRIC_NAMES, slide_metrics
from ds_wsi.evaluation.predict import ALL_TILES, SlidePrediction
from ds_wsi.evaluation.protocol import EvaluationProtocol
from ds_wsi.evaluation.report import TaskPart, write_report
from ds_wsi.evaluation.slide_maps import draw_heatmaps
from ds_wsi.evaluation.tasks.answers import run_outputs
from ds_wsi.evaluation.tasks.files import TaskScores, prediction_rows, write_rows
from ds_wsi.evaluation.tasks.sections import drawn_sections
from ds_wsi.evaluation.tasks.several import Answers
from ds_wsi.runtime.files import atomic_path, json_number, write_json
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.words import counted

REPORT = "report.html"


def write_results(
    directory: Path,
    cohort: Cohort,
    predictions: Sequence[SlidePrediction],
    *,
    title: str,
    summary: Mapping[str, str],
    failures: Sequence[Mapping[str, Any]] = (),
    history: Sequence[Mapping[str, Any]] = (),
    best_epoch: int | None = None,
    metric: str = "auc",
    seed: int = 0,
    protocol: EvaluationProtocol = ALL_TILES,
    norms: Mapping[str, Any] | None = None,
    split: str = "test",
    n_heatmaps: int | None = None,
    shown: bool = True,
    dataset: str = "",
    changed: Mapping[str, Any] | None = None,
    tell: Callable[[str], object] = logger.info,
    made_of: Callable[[int], str] = lambda row: "",
    answers: Answers | None = None,
    heatmaps: list[tuple[str, Path]] | None = None,
) -> dict[str, MetricInterval]:
    """Write everything about a set of predictions below `directory`, and return the metrics with their intervals.

    `split` and `dataset` name the slides, "all" those of all splits; `changed` is as of `write_report`. Of several runs
    of the protocol, metrics are the mean of the runs', and predictions hold the mean probabilities. The metrics are
    told before heat maps are drawn, of the first `n_heatmaps` slides, of all with None; `shown` is for their bar.
    `made_of` is as of `draw_heatmaps`, and `heatmaps` what that has returned, where they are drawn already. `answers`
    are of another task than classification.
    """
    scores, rows = _told(cohort, predictions, seed, answers)
    of_norms = {} if norms is None else {"norms": _finite(norms)}
    write_json(directory / "metrics.json", {"dataset": dataset, "split": split, **scores.to_json(protocol), **of_norms})
    of_task = _written(directory, cohort, predictions, rows, answers, split)
    curves = _curves_of(directory, history, best_epoch, metric)
    scores.tell(tell, split)
    if heatmaps is None:
        some = predictions[:n_heatmaps]
        heatmaps = draw_heatmaps(directory / "heatmaps", cohort, some, shown=shown, made_of=made_of)
    write_report(
        directory / REPORT,
        title=title,
        summary=dict(summary) | ({} if scores.positive is None else {"positive class": scores.positive}),
        intervals=scores.intervals,
        predictions=rows,
        curves_png=curves,
        heatmaps=heatmaps,
        failures=[dict(failure) for failure in failures],
        resampled="slides" if scores.n_patients == scores.n_slides else f"the {scores.n_patients} patients",
        sections={"Evaluation": _protocol_words(protocol, scores.runs)} if protocol.tiles else None,
        cohort=cohort_lines(cohort.manifest, cohort.lengths),
        changed=changed,
        of_task=of_task,
    )
    return scores.intervals


def _told(
    cohort: Cohort, predictions: Sequence[SlidePrediction], seed: int, answers: Answers | None
) -> "tuple[_Scores | TaskScores, list[dict[str, Any]]]":
    """The metrics, and the rows of predictions.csv."""
    if answers is not None:
        outputs = run_outputs([prediction.run_logits for prediction in predictions])
        slides = [cohort.manifest.slides[prediction.slide] for prediction in predictions]
        return TaskScores.of(answers, slides, outputs, seed), _task_rows(cohort, predictions, outputs, answers)
    probabilities = _run_probabilities(predictions).numpy()
    scores = _Scores.of(cohort, predictions, probabilities, seed)
    return scores, _prediction_rows(cohort, predictions, probabilities.mean(axis=0))


def _written(
    directory: Path,
    cohort: Cohort,
    predictions: Sequence[SlidePrediction],
    rows: list[dict[str, Any]],
    answers: Answers | None,
    split: str,
) -> TaskPart | None:
    """Write predictions.csv; of another task than classification its pictures too, and what the report shows."""
    if answers is None:
        _write_predictions(directory / "predictions.csv", rows)
        return None
    write_rows(directory / "predictions.csv", rows)
    slides = [cohort.manifest.slides[prediction.slide] for prediction in predictions]
    sections = drawn_sections(directory, answers, slides, rows, split)
    return TaskPart(sections, sum(slide.is_labelled for slide in slides))


def _task_rows(
    cohort: Cohort, predictions: Sequence[SlidePrediction], outputs: Sequence[torch.Tensor], answers: Answers
) -> list[dict[str, Any]]:
    rows, n_tiles = [one.slide for one in predictions], [len(one.kept) for one in predictions]
    return prediction_rows(answers, cohort, rows, outputs, n_tiles)


@dataclass(frozen=True)
class _Scores:
    """The metrics of a set of labelled slides.

    Attributes:
        classes: names of the classes, in the order of the logits.
        n_slides, n_patients: how many were predicted.
        intervals: metric -> the mean of the runs', with its interval.
        runs: see `_metrics_of_runs`.
        bag: "slide" or "patient": what was predicted.
    """

    classes: Sequence[str]
    n_slides: int
    n_patients: int
    intervals: dict[str, MetricInterval]
    runs: dict[str, dict[str, Any]]
    bag: str = "slide"

    @classmethod
    def of(
        cls, cohort: Cohort, predictions: Sequence[SlidePrediction], probabilities: np.ndarray, seed: int
    ) -> "_Scores":
        """Measure the probabilities [R, N, C] of these predictions; the seed draws the bootstrap's slides."""
        slides = [cohort.manifest.slides[prediction.slide] for prediction in predictions]
        labels, patients = np.array([slide.class_index for slide in slides]), [slide.patient_id for slide in slides]
        intervals = bootstrap_metrics(labels, probabilities, seed=seed, patients=patients)
        runs = _metrics_of_runs(labels, probabilities)
        counts = len(slides_of_rows(slides)), len(set(patients))
        return cls(cohort.manifest.classes, *counts, intervals, runs, bag_word(slides))

    @property
    def positive(self) -> str | None:
        """The class that f1 is of; None of more than two classes, whose f1 is the mean of all."""
        return self.classes[1] if len(self.classes) == 2 else None

    def to_json(self, protocol: EvaluationProtocol) -> dict[str, Any]:
        """What metrics.json says of them, under the protocol that they were measured by."""
        return {
            "classes": list(self.classes),
            **({} if self.bag == "slide" else {"bag": self.bag}),
            "n_slides": self.n_slides,
            "n_patients": self.n_patients,
            "evaluation": asdict(protocol),
            "positive_class": self.positive,
            "metrics": metrics_to_json(self.intervals),
            "runs": self.runs,
        }

    def tell(self, tell: Callable[[str], object], split: str) -> None:
        """Tell the metrics as a table."""
        words = f"metrics of {counted(self.n_slides if self.bag == 'slide' else self.n_patients, self.bag)}"
        words = f"{words} of all splits" if split == "all" else f"{split} {words}"
        tell(f"{words}:\n{format_table(self.intervals)}")
        if self.positive is not None:
            tell(f"f1 is that of class {self.positive}, the second")


def _curves_of(
    directory: Path, history: Sequence[Mapping[str, Any]], best_epoch: int | None, metric: str
) -> Path | None:
    """The picture of the training's epochs, where there were some."""
    if not history:
        return None
    path = directory / "curves.png"
    draw_curves([dict(entry) for entry in history], path, best_epoch=best_epoch, metric=metric)
    return path


def _run_probabilities(predictions: Sequence[SlidePrediction]) -> torch.Tensor:
    """The slides' probabilities in each run of the protocol, float64 [R, N, C]."""
    return torch.stack([prediction.run_logits for prediction in predictions], dim=1).double().softmax(-1)


def write_predictions(
    directory: Path,
    cohort: Cohort,
    predictions: Sequence[SlidePrediction],
    made_of: Callable[[int], str] = lambda row: "",
    answers: Answers | None = None,
    heatmaps: list[tuple[str, Path]] | None = None,
) -> None:
    """Write what can be told of slides without labels: predictions.csv, without the column label, and heat maps."""
    path = directory / "predictions.csv"
    if answers is None:
        rows = _prediction_rows(cohort, predictions, _run_probabilities(predictions).mean(dim=0).numpy())
        _write_predictions(path, rows)
    else:
        outputs = run_outputs([prediction.run_logits for prediction in predictions])
        rows = _task_rows(cohort, predictions, outputs, answers)
        write_rows(path, rows)
    drawn = heatmaps
    if drawn is None:
        drawn = draw_heatmaps(directory / "heatmaps", cohort, predictions, made_of=made_of)
    bag = bag_word(cohort.manifest.slides)
    logger.info(
        "no labels in %s: %s predicted, without metrics and report: %s, %s",
        *(cohort.manifest.source, f"{counted(len(rows), bag)} {'is' if len(rows) == 1 else 'are'}", path),
        counted(len(drawn), "heat map"),
    )


def _finite(value: Any) -> Any:
    """The value, with null where JSON has no number."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return json_number(value) if isinstance(value, float) else value


def _metrics_of_runs(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, dict[str, Any]]:
    """Metric -> its value in each run, their mean and sample standard deviation; None where undefined."""
    each = [slide_metrics(labels, run) for run in probabilities]
    of_metric = {}
    for name in METRIC_NAMES:
        values = [metrics[name] for metrics in each]
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        numbers = [json_number(value) for value in (float(np.mean(values)), spread, *values)]
        of_metric[name] = {"mean": numbers[0], "std": numbers[1], "values": numbers[2:]}
    return of_metric


def _protocol_words(protocol: EvaluationProtocol, runs: Mapping[str, Mapping[str, Any]]) -> str:
    words = (
        f"Each slide is tested on {protocol}, drawn without replacement; a slide with fewer tiles is taken whole. "
        "Metrics are the mean of the runs'; their intervals resample slides, not tiles. Predictions show the mean "
        "probability over the runs; heat maps show the first run's tiles."
    )
    spread = [
        f"{name.replace('_', ' ')} {metric['mean']:.3f} ± {metric['std']:.3f}"
        for name, metric in runs.items()
        if metric["std"] is not None
    ]
    return f"{words}\n\nMean ± sample standard deviation over the runs: {', '.join(spread)}." if spread else words


def _prediction_rows(
    cohort: Cohort, predictions: Sequence[SlidePrediction], probabilities: np.ndarray
) -> list[dict[str, Any]]:
    classes = cohort.manifest.classes
    rows = []
    for prediction, chances in zip(predictions, probabilities, strict=True):
        entry = cohort.manifest.slides[prediction.slide]
        predicted = int(chances.argmax())
        rows.append(
            {
                **bag_names(entry),
                "label": cohort.manifest.label_name(entry),
                "predicted": classes[predicted],
                "probabilities": dict(zip(classes, (float(chance) for chance in chances), strict=True)),
                "n_tiles": len(prediction.kept),
                "correct": predicted == entry.label,
            }
        )
    return rows


def _write_predictions(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    classes = list(rows[0]["probabilities"])
    label = ["label"] if any(row["label"] for row in rows) else []
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = (*(name for name in NAMES if name in rows[0]), *label, "predicted", "n_tiles")
        writer.writerow([*names, *(f"probability_{name}" for name in classes)])
        for row in rows:
            # Every digit: rounded, confident slides would tie, and a comparison find another AUC than metrics.json.
            writer.writerow([*(row[name] for name in names), *(repr(row["probabilities"][name]) for name in classes)])
