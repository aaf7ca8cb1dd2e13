"""The report's confusion matrix and ROC curve: HTML and inline SVG, without a script."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from ds_wsi.evaluation.page import head_cell, section, table

SIDE_PX = 300  # of the ROC curve's square
COLOURS = ("var(--accent)", "#b8562f", "#3f8a52", "#8a5fb0", "#b08a1e", "#4b9aa5")  # of curves, in turn
SHOWN_CURVES = 12


def confusion_section(predictions: Sequence[Mapping[str, Any]]) -> str:
    """A table of counts: one row per label, one column per predicted class; empty without predictions.

    Args:
        predictions: see `write_report`.
    """
    if not predictions:
        return ""
    classes = classes_of(predictions)
    counts = Counter((row["label"], row["predicted"]) for row in predictions)
    head = [head_cell("Label"), *(head_cell(f"Predicted {name}", True) for name in classes), head_cell("Slides", True)]
    rows = []
    for label in classes:
        cells = [
            f'<td class="number{" diagonal" if name == label else ""}">{counts[label, name]}</td>' for name in classes
        ]
        total = sum(counts[label, name] for name in classes)
        rows.append(f'<tr><th scope="row">{escape(label)}</th>{"".join(cells)}<td class="number">{total}</td></tr>')
    return section("Confusion matrix", table(head, rows, "confusion"))


def classes_of(predictions: Sequence[Mapping[str, Any]]) -> list[str]:
    """The classes' names in the order of the logits."""
    return list(dict.fromkeys(name for row in predictions for name in row["probabilities"]))


def roc_points(positive: npt.ArrayLike, scores: npt.ArrayLike) -> npt.NDArray[np.float64] | None:
    """The corners of an ROC curve, from (0, 0) to (1, 1); equal scores make one slanted stretch.

    Args:
        positive: bool [N], whether a slide is of the class.
        scores: float [N], its probability.

    Returns:
        Float64 [K, 2]: rates of false and of true positives, whose trapezoids add up to the AUC; None where one of the
        two kinds has no slide.
    """
    is_positive, values = np.asarray(positive, dtype=bool), np.asarray(scores, dtype=np.float64)
    if is_positive.all() or not is_positive.any():
        return None
    order = np.argsort(-values, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))  # after the last of equal scores
    true = np.cumsum(is_positive[order])[ends] / is_positive.sum()
    false = np.cumsum(~is_positive[order])[ends] / (~is_positive).sum()
    return np.vstack([[0.0, 0.0], np.column_stack([false, true])])


def roc_section(predictions: Sequence[Mapping[str, Any]]) -> str:
    """The ROC curve of the second of two classes; of more classes one curve each against the rest.

    Empty where no class has slides of both kinds.

    Args:
        predictions: see `write_report`.
    """
    classes = classes_of(predictions)
    shown = classes[1:] if len(classes) == 2 else classes
    curves = []
    for name in shown:
        positive = [row["label"] == name for row in predictions]
        points = roc_points(positive, [row["probabilities"].get(name, math.nan) for row in predictions])
        if points is not None:
            curves.append((name, points))
    if not curves:
        return ""
    return curves_section(curves, f"Of class {shown[0]}." if len(classes) == 2 else "Each class against the rest.")


def curves_section(curves: Sequence[tuple[str, npt.NDArray[np.float64]]], note: str) -> str:
    """Named ROC curves under a note; the first `SHOWN_CURVES` of them."""
    left_out = len(curves) - SHOWN_CURVES
    note += f" {left_out} more classes are not drawn." if left_out > 0 else ""
    return section("ROC curve", f'<p class="note">{escape(note)}</p>\n{_svg(curves[:SHOWN_CURVES])}')


def _svg(curves: Sequence[tuple[str, npt.NDArray[np.float64]]]) -> str:
    left, top = 52, 10
    right, bottom = left + SIDE_PX, top + SIDE_PX
    parts = [
        f'<rect x="{left}" y="{top}" width="{SIDE_PX}" height="{SIDE_PX}" fill="none" stroke="var(--line)"/>',
        f'<line x1="{left}" y1="{bottom}" x2="{right}" y2="{top}" stroke="var(--line)" stroke-dasharray="4 4"/>',
    ]
    for share in (0.0, 0.5, 1.0):
        x, y = left + share * SIDE_PX, bottom - share * SIDE_PX
        parts.append(f'<text x="{x:g}" y="{bottom + 18}" text-anchor="middle">{share:g}</text>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:g}" text-anchor="end">{share:g}</text>')
    middle = top + SIDE_PX // 2
    parts.append(
        f'<text x="{left + SIDE_PX // 2}" y="{bottom + 38}" text-anchor="middle">'
        "false positives, of all negatives</text>"
    )
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        "true positives, of all positives</text>"
    )
    for number, (name, points) in enumerate(curves):
        colour, y = COLOURS[number % len(COLOURS)], top + 14 + 22 * number
        dashes = ' stroke-dasharray="6 3"' if number >= len(COLOURS) else ""
        corners = " ".join(f"{left + x * SIDE_PX:.1f},{bottom - y * SIDE_PX:.1f}" for x, y in points)
        area = float(np.sum(np.diff(points[:, 0]) * (points[1:, 1] + points[:-1, 1]) / 2))
        parts.append(f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        parts.append(
            f'<line x1="{right + 20}" y1="{y - 4}" x2="{right + 44}" y2="{y - 4}" stroke="{colour}" '
            f'stroke-width="2"{dashes}/><text x="{right + 52}" y="{y}">{escape(name)}, area {area:.3f}</text>'
        )
    height = max(bottom + 48, top + 22 * len(curves) + 14)
    return (
        f'<div class="scroll"><svg class="roc" role="img" aria-label="ROC curve" width="{right + 320}" '
        f'height="{height}" viewBox="0 0 {right + 320} {height}">\n' + "\n".join(parts) + "\n</svg></div>"
    )
