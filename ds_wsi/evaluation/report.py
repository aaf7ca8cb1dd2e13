"""The run as one HTML file that opens anywhere: no script, no font and no image from outside."""

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ds_wsi.bags.slide_entry import SLIDE_IDS
from ds_wsi.evaluation.bootstrap import MetricInterval, range_words
from ds_wsi.evaluation.figures import classes_of, confusion_section, roc_section
from ds_wsi.evaluation.page import head_cell, page, section, table
from ds_wsi.runtime.files import write_text
from ds_wsi.runtime.words import counted

MAX_CURVES_PX = 1800  # the longer side
# The longer side of a heat map: full size up to 40 of them, then smaller, so that the file stays near 10 MB.
MAX_HEATMAP_PX, MIN_HEATMAP_PX, FULL_SIZE_HEATMAPS = 1400, 480, 40
JPEG_QUALITY = 85

METRIC_TITLES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "auc": "AUC",
    "quadratic_weighted_kappa": "Quadratic weighted kappa",
    "f1": "F1",
    "pearson": "Pearson's r",
    "spearman": "Spearman's rho",
    "r2": "R²",
    "mae": "Mean absolute error",
    "rmse": "Root mean squared error",
    "macro_auc": "Macro AUC",
    "micro_auc": "Micro AUC",
    "map": "Mean average precision",
    "c_index": "C-index",
    "c_index_stratified": "C-index within strata",
    "uno_c": "Uno's C",
    "auc_t": "AUC over time",
    "ibs": "Integrated Brier score",
    "ibs_kaplan_meier": "Integrated Brier score of Kaplan-Meier",
}


class TaskPart(NamedTuple):
    """What the report shows of another task than classification: HTML sections, and the slides behind the metrics."""

    sections: Sequence[str]
    n_slides: int


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: Mapping[str, str],
    intervals: Mapping[str, MetricInterval],
    predictions: Sequence[Mapping[str, Any]],
    curves_png: Path | None,
    heatmaps: Sequence[tuple[str, Path]],
    failures: Sequence[Mapping[str, Any]],
    sections: Mapping[str, str] | None = None,
    resampled: str = "slides",
    cohort: Sequence[Sequence[str]] = (),
    changed: Mapping[str, Any] | None = None,
    of_task: TaskPart | None = None,
) -> None:
    """Write the report: metrics, settings, curves, predictions, heat maps and failed tiles on one offline page.

    Predictions that are wrong come first, those that the model was surest of at the top.

    All text is escaped; images are embedded, heat maps as JPEG and smaller where there are many.

    Args:
        path: where to; written atomically.
        title: the page's.
        summary: settings and environment, name -> value.
        intervals: metric name -> value and interval, as `bootstrap_metrics` returns them.
        predictions: one per slide: slide_id, label and predicted (class names), probabilities {class name: float},
            n_tiles, correct; one per patient with patient_id and slide_ids in the place of slide_id.
        curves_png: the training curves, or None.
        heatmaps: (slide_id, PNG) each.
        failures: one per tile that could not be read, such as slide_id, x, y, reason; all of one form.
        sections: heading -> plain text, put after the metrics; blank lines part paragraphs.
        resampled: what the intervals' bootstrap drew.
        cohort: what `cohort_lines` returns.
        changed: settings that differ from the defaults, name -> value; None where there are none to tell of.
        of_task: the part of another task than classification, in the place of confusion, ROC curve and predictions.

    Raises:
        FileNotFoundError: an image that is not there.
    """
    n_bags = len(predictions) if of_task is None else of_task.n_slides
    anchors = {slide_id: f"heatmap-{number}" for number, (slide_id, _) in enumerate(heatmaps)}
    body = [
        f"<h1>{escape(title)}</h1>",
        _metrics_section(intervals, counted(n_bags, _bag_of(predictions)), resampled),
        *(_prose_section(heading, text) for heading, text in (sections or {}).items()),
        *(
            (confusion_section(predictions), roc_section(predictions), _predictions_section(predictions, anchors))
            if of_task is None
            else of_task.sections
        ),
        _cohort_section(cohort),
        _curves_section(curves_png),
        _failures_section(failures),
        _heatmaps_section(heatmaps, anchors, predictions),
        _summary_section(summary),
        _changed_section(changed),
    ]
    write_text(path, page(title, "\n".join(part for part in body if part)))


def _metrics_section(intervals: Mapping[str, MetricInterval], bags: str, resampled: str) -> str:
    if not intervals:
        return section("Metrics", "<p>No metric was computed.</p>")
    confidence = next(iter(intervals.values())).confidence
    lowest = -1.0 if any(min(interval.value, interval.low) < 0 for interval in intervals.values()) else 0.0
    axis = f"{lowest:g} to 1"
    head = [head_cell("Metric"), head_cell("Value", True), head_cell(f"{100 * confidence:g}% interval", True)]
    head += [f'<th scope="col" class="bar">{axis}</th>', head_cell("Resamples", True)]
    rows = [_metric_row(name, interval, lowest) for name, interval in intervals.items()]
    note = (
        f'<p class="note">Over {bags}. Intervals: percentile bootstrap over {escape(resampled)}; '
        "resamples on which a metric is undefined are left out of its interval. Where every slide is right, or none, "
        "the accuracy's interval is exact (Clopper and Pearson), and a bootstrap cannot tell the others'.</p>"
    )
    return section("Metrics", note + "\n" + table(head, rows, "headline"))


def _metric_row(name: str, interval: MetricInterval, lowest: float) -> str:
    value = "undefined" if math.isnan(interval.value) else f"{interval.value:.3f}"
    ends = range_words(interval) or f"{interval.low:.3f} to {interval.high:.3f}"
    return (
        f'<tr><th scope="row">{escape(METRIC_TITLES.get(name, name))}</th><td class="number value">{value}</td>'
        f'<td class="number">{ends}</td><td class="bar">{_interval_bar(interval, lowest)}</td>'
        f'<td class="number">{interval.n_resamples_used:,}</td></tr>'
    )


def _interval_bar(interval: MetricInterval, lowest: float) -> str:
    """Draw the interval as a line with a dot on the scale from `lowest` to 1."""
    # Of a metric without an end, such as an error in the target's unit, there is no scale.
    if math.isnan(interval.value) or math.isnan(interval.low) or interval.high > 1 or interval.low < lowest:
        return ""
    low, value, high = (100 * (end - lowest) / (1 - lowest) for end in (interval.low, interval.value, interval.high))
    return (
        '<svg aria-hidden="true"><line x1="0%" x2="100%" y1="50%" y2="50%" stroke="var(--line)"/>'
        f'<line x1="{low:.2f}%" x2="{high:.2f}%" y1="50%" y2="50%" stroke="var(--accent)" stroke-width="3"/>'
        f'<circle cx="{value:.2f}%" cy="50%" r="4.5" fill="var(--accent)"/></svg>'
    )


def _prose_section(heading: str, text: str) -> str:
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    return section(heading, "\n".join(f'<p class="prose">{escape(part)}</p>' for part in paragraphs))


def _predictions_section(predictions: Sequence[Mapping[str, Any]], anchors: Mapping[str, str]) -> str:
    if not predictions:
        return section("Predictions", "<p>No slide was predicted.</p>")
    classes = classes_of(predictions)
    right = sum(bool(row["correct"]) for row in predictions)
    head = [
        head_cell(_bag_of(predictions).capitalize()),
        head_cell("Label"),
        head_cell("Predicted"),
        head_cell("Result"),
    ]
    head += [*(head_cell(f"P({name})", True) for name in classes), head_cell("Tiles", True)]
    rows = [_prediction_row(row, classes, anchors) for row in sorted(predictions, key=_wrong_first)]
    order = " The wrong ones come first." if 0 < right < len(predictions) else ""
    told = f"{right} of {len(predictions)} {_bag_of(predictions)}s are predicted correctly."
    note = f"<p>{told}{order}{_link_note(anchors)}</p>"
    return section("Predictions", note + "\n" + table(head, rows, "predictions"))


def _wrong_first(row: Mapping[str, Any]) -> tuple[bool, float]:
    """Wrong ones by how sure of them the model was; right ones keep their order."""
    return (True, 0.0) if row["correct"] else (False, -row["probabilities"].get(row["predicted"], 0.0))


def _link_note(anchors: Mapping[str, str]) -> str:
    return " A slide's name leads to its heat map." if anchors else ""


def _prediction_row(row: Mapping[str, Any], classes: Sequence[str], anchors: Mapping[str, str]) -> str:
    name = escape(str(row["slide_id" if "slide_id" in row else "patient_id"]))
    drawn = [slide_id for slide_id in _slides_of(row) if slide_id in anchors]
    if drawn:
        name = f'<a href="#{anchors[drawn[0]]}">{name}</a>'
    kind, result = ("right", "correct") if row["correct"] else ("wrong", "wrong")
    cells = [_probability(row, name) for name in classes]
    return (
        f'<tr class="{kind}"><th scope="row">{name}</th><td>{escape(str(row["label"]))}</td>'
        f'<td>{escape(str(row["predicted"]))}</td><td><span class="mark">{result}</span></td>'
        f'{"".join(cells)}<td class="number">{int(row["n_tiles"]):,}</td></tr>'
    )


def _slides_of(row: Mapping[str, Any]) -> list[str]:
    """The slides of a prediction: one, or a patient's."""
    return [str(row["slide_id"])] if "slide_id" in row else str(row["slide_ids"]).split(SLIDE_IDS)


def _bag_of(predictions: Sequence[Mapping[str, Any]]) -> str:
    """What each prediction is of, in a word."""
    return "patient" if any("slide_ids" in row for row in predictions) else "slide"


def _probability(row: Mapping[str, Any], name: str) -> str:
    value = row["probabilities"].get(name, math.nan)
    kind = "number predicted" if name == row["predicted"] else "number"
    return f'<td class="{kind}">{"" if math.isnan(value) else f"{value:.3f}"}</td>'


def _cohort_section(lines: Sequence[Sequence[str]]) -> str:
    """One row per line, its name first; the first line has the columns' headings."""
    if not lines:
        return ""
    (_, *names), *rest = lines
    head = ["<td></td>", *(head_cell(name, True) for name in names)]
    rows = [
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
        + "</tr>"
        for name, *cells in rest
    ]
    return section("Cohort", table(head, rows, "cohort"))


def _curves_section(curves_png: Path | None) -> str:
    if curves_png is None:
        return ""
    image = image_html(curves_png, "PNG", MAX_CURVES_PX, "Losses and validation metrics over the epochs")
    return section("Training", f'<figure class="curves scroll">{image}</figure>')


def _failures_section(failures: Sequence[Mapping[str, Any]]) -> str:
    if not failures:
        return section("Failed tiles", "<p>No tile failed to read.</p>")
    columns = list(dict.fromkeys(key for row in failures for key in row))
    slides = len({str(row.get("slide_id")) for row in failures})
    rows = [
        "<tr>" + "".join(f"<td>{escape(str(row.get(key, '')))}</td>" for key in columns) + "</tr>" for row in failures
    ]
    note = f"<p>{counted(len(failures), 'tile')} of {counted(slides, 'slide')} could not be read and took no part.</p>"
    return section("Failed tiles", note + "\n" + table([head_cell(key.replace("_", " ")) for key in columns], rows))


def _heatmaps_section(
    heatmaps: Sequence[tuple[str, Path]], anchors: Mapping[str, str], predictions: Sequence[Mapping[str, Any]]
) -> str:
    if not heatmaps:
        return ""
    outcomes = {slide_id: row for row in predictions for slide_id in _slides_of(row)}
    longest, bag = heatmap_side_px(len(heatmaps)), _bag_of(predictions)
    figures = [
        f'<figure id="{anchors[slide_id]}"><figcaption><strong>{escape(slide_id)}</strong> '
        f"{_outcome(outcomes.get(slide_id))}</figcaption>"
        f"{image_html(png, 'JPEG', longest, f'Attention over slide {slide_id}')}</figure>"
        for slide_id, png in heatmaps
    ]
    note = (
        f'<p class="note">Left the slide, right the attention of its tiles. The colours rank the tiles of one {bag}: '
        f"two {bag}s cannot be compared by them.</p>"
    )
    return section("Heat maps", note + "\n" + "\n".join(figures))


def heatmap_side_px(count: int) -> int:
    """Return the longest side for each of `count` embedded heat maps, so that their total area stays bounded."""
    side = MAX_HEATMAP_PX * math.sqrt(FULL_SIZE_HEATMAPS / max(count, FULL_SIZE_HEATMAPS))
    return max(MIN_HEATMAP_PX, int(side))


def _outcome(row: Mapping[str, Any] | None) -> str:
    if row is None or "correct" not in row:
        return ""
    kind, result = ("right", "correct") if row["correct"] else ("wrong", "wrong")
    label, predicted = escape(str(row["label"])), escape(str(row["predicted"]))
    return f'<span class="{kind}">{label}, predicted {predicted} <span class="mark">{result}</span></span>'


def _changed_section(changed: Mapping[str, Any] | None) -> str:
    if changed is None:
        return ""
    pairs = "\n".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in changed.items())
    heading = "Settings that differ from the defaults"
    return section(heading, f"<dl>\n{pairs}\n</dl>" if changed else "<p>None does.</p>")


def _summary_section(summary: Mapping[str, str]) -> str:
    pairs = "\n".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in summary.items())
    return section("Run", f"<dl>\n{pairs}\n</dl>") if summary else ""


def image_html(path: Path, kind: str, longest_px: int, description: str) -> str:
    """Embed an image, reduced to `longest_px` where it is larger."""
    with Image.open(path, formats=("PNG",)) as opened:
        image = opened.convert("RGB")
    image.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=JPEG_QUALITY, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<img width="{image.width}" height="{image.height}" alt="{escape(description)}" '
        f'src="data:image/{kind.lower()};base64,{data}">'
    )
