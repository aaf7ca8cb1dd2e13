"""What a run leaves behind: metrics.json, predictions.csv, heat maps, curves and the report."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_wsi.bags.cohort import Cohort
from ds_wsi.bags.features import FeatureFile, read_places
from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.evaluation.bootstrap import MetricInterval, bootstrap_metrics, format_table, metrics_to_json
from ds_wsi.evaluation.curves import draw_curves
from ds_wsi.evaluation.heatmap import draw_attention
from ds_wsi.evaluation.predict import SlidePrediction
from ds_wsi.evaluation.report import write_report
from ds_wsi.runtime.files import atomic_path, write_json
from ds_wsi.runtime.log import logger
from ds_wsi.slides.slide import Slide, SlideError
from ds_wsi.slides.tiling import TileGrid

OVERVIEW_SIDE_PX = 900  # of the thumbnails under the heat maps


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
) -> dict[str, MetricInterval]:
    """Write everything about a set of predictions below `directory`, and return the metrics with their intervals."""
    labels = np.array([cohort.manifest.slides[prediction.slide].label for prediction in predictions])
    probabilities = torch.stack([prediction.logits for prediction in predictions]).double().softmax(-1).numpy()
    intervals = bootstrap_metrics(labels, probabilities, seed=seed)
    rows = _prediction_rows(cohort, predictions, probabilities)
    write_json(directory / "metrics.json", {"n_slides": len(rows), "metrics": metrics_to_json(intervals)})
    _write_predictions(directory / "predictions.csv", rows)
    curves = None
    if history:
        curves = directory / "curves.png"
        draw_curves([dict(entry) for entry in history], curves, best_epoch=best_epoch, metric=metric)
    heatmaps = draw_heatmaps(directory / "heatmaps", cohort, predictions)
    write_report(
        directory / "report.html",
        title=title,
        summary=dict(summary),
        intervals=intervals,
        predictions=rows,
        curves_png=curves,
        heatmaps=heatmaps,
        failures=[dict(failure) for failure in failures],
    )
    logger.info("test metrics of %d slides:\n%s", len(rows), format_table(intervals))
    return intervals


def draw_heatmaps(directory: Path, cohort: Cohort, predictions: Sequence[SlidePrediction]) -> list[tuple[str, Path]]:
    """Draw each slide's attention over its thumbnail.

    An aggregator without attention draws none, nor do features without coordinates or without their slide: each reason
    is logged once.
    """
    drawn = []
    left_out: dict[str, list[str]] = {}
    for prediction in predictions:
        if prediction.attention is None:
            logger.info("no heat maps: the aggregator has no attention")
            return []
        entry, grid = cohort.manifest.slides[prediction.slide], cohort.grids[prediction.slide]
        path = directory / f"{entry.slide_id}.png"
        title = f"{entry.slide_id} (label: {cohort.manifest.classes[entry.label]})"
        if isinstance(grid, TileGrid):
            coords = grid.coords[prediction.kept.numpy()]
            _draw(entry, coords, grid.tile_size_level0_px, prediction.attention, path, title)
        elif (reason := _draw_features(entry, grid, prediction.attention, path, title)) is not None:
            left_out.setdefault(reason, []).append(entry.slide_id)
            continue
        drawn.append((entry.slide_id, path))
    for reason, slide_ids in left_out.items():
        shown = ", ".join(slide_ids[:3]) + (", ..." if len(slide_ids) > 3 else "")
        logger.info("no heat map of %d slides (%s): %s", len(slide_ids), shown, reason)
    return drawn


def _draw(
    entry: SlideEntry, coords: np.ndarray, tile_size_level0_px: float, attention: torch.Tensor, path: Path, title: str
) -> None:
    with Slide(entry.path, entry.mpp, entry.slide_id) as slide:
        downsample = max(1.0, max(slide.width_px, slide.height_px) / OVERVIEW_SIDE_PX)
        thumbnail, downsample = slide.read_overview_downsampled(downsample)
    draw_attention(thumbnail, coords, tile_size_level0_px, attention.numpy(), downsample, path, title)


def _draw_features(entry: SlideEntry, file: FeatureFile, attention: torch.Tensor, path: Path, title: str) -> str | None:
    """Draw the attention over features on disk, or return why it cannot be drawn."""
    if not entry.path.is_file():
        return "the manifest names no slide file that is there"
    places = read_places(file.path)
    if places is None:
        return "the features have no coordinates, or one tile alone"
    try:
        _draw(entry, *places, attention, path, title)
    except SlideError:
        return "the slide cannot be read"
    except ValueError:
        if not attention.isfinite().all():
            raise
        return "the coordinates do not lie on the slide that the manifest names"
    return None


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
                "slide_id": entry.slide_id,
                "label": classes[entry.label],
                "predicted": classes[predicted],
                "probabilities": dict(zip(classes, (float(chance) for chance in chances), strict=True)),
                "n_tiles": len(prediction.kept),
                "correct": predicted == entry.label,
            }
        )
    return rows


def _write_predictions(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    classes = list(rows[0]["probabilities"])
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "label", "predicted", "n_tiles", *(f"probability_{name}" for name in classes)])
        for row in rows:
            chances = [f"{row['probabilities'][name]:.8f}" for name in classes]
            writer.writerow([row["slide_id"], row["label"], row["predicted"], row["n_tiles"], *chances])
