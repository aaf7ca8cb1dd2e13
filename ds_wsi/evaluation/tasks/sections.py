"""What the report shows of a task's answers: its picture, ROC curves or confusion, and the predictions."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.evaluation.figures import confusion_section, curves_section, roc_points
from ds_wsi.evaluation.page import head_cell, section, table
from ds_wsi.evaluation.report import image_html
from ds_wsi.evaluation.task_metrics.risk_groups import RiskGroups
from ds_wsi.evaluation.tasks.answers import TaskAnswers
from ds_wsi.evaluation.tasks.files import CURVES, SCATTER, draw_pictures, group_words
from ds_wsi.evaluation.tasks.several import Answers

LONGEST_PX = 1400


def drawn_sections(
    directory: Path, answers: Answers, slides: Sequence[SlideEntry], rows: Sequence[Mapping[str, Any]], split: str
) -> list[str]:
    """Draw the pictures of a task, or of each of several targets, and return the report's HTML sections.

    Args:
        directory: where the pictures go.
        answers: the model's.
        slides: N.
        rows: `prediction_rows` of the same slides.
        split: the slides'.
    """
    if isinstance(answers, TaskAnswers):
        sections = task_sections(answers, slides, rows, *draw_pictures(directory, answers, slides, rows, split))
        return [*sections, predictions_section(rows)]
    sections = []
    for part in answers.parts(slides, []):
        drawn = draw_pictures(directory, part.answers, part.slides, rows, split, f"{part.name}_")
        sections += task_sections(part.answers, part.slides, rows, *drawn, target=part.name)
    return [*sections, predictions_section(rows)]


def task_sections(
    answers: TaskAnswers,
    slides: Sequence[SlideEntry],
    rows: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Path],
    groups: RiskGroups | None,
    target: str = "",
) -> list[str]:
    """HTML sections of a target, in their order; all text is escaped.

    Args:
        answers: the model's.
        slides: N.
        rows: `prediction_rows` of the same slides.
        pictures, groups: what `draw_pictures` returned.
        target: the name among several.
    """
    task, parts, of = answers.task, [], f" ({target})" if target else ""
    if CURVES in pictures and groups is not None:
        lines = "".join(f"<br>{escape(line)}" for line in group_words(groups))
        note = f'<p class="note">Patients by predicted risk, cut at the median of the training split.{lines}</p>'
        figure = image_html(pictures[CURVES], "PNG", LONGEST_PX, "Kaplan-Meier curves of the risk groups")
        parts.append(section(f"Survival by risk group{of}", f'{note}\n<figure class="scroll">{figure}</figure>'))
    if SCATTER in pictures:
        figure = image_html(pictures[SCATTER], "PNG", LONGEST_PX, "Predictions over values")
        parts.append(section(f"Predictions over values{of}", f'<figure class="scroll">{figure}</figure>'))
    if task.kind == "ordinal":
        (name,) = task.columns
        labelled_rows = [
            {
                "label": row[name],
                "predicted": row[f"{name}_predicted"],
                "probabilities": dict.fromkeys(task.classes, math.nan),
            }
            for row in rows
            if row[name] is not None
        ]
        parts.append(confusion_section(labelled_rows))
    if task.kind == "multilabel":
        parts.append(_roc_section(answers, rows))
    return parts


def _roc_section(answers: TaskAnswers, rows: Sequence[Mapping[str, Any]]) -> str:
    """One curve per label that has slides of both kinds."""
    curves = []
    for name in answers.task.classes:
        labelled_rows = [row for row in rows if row[name] is not None]
        points = roc_points(
            [row[name] == 1 for row in labelled_rows], [row[f"{name}_probability"] for row in labelled_rows]
        )
        if labelled_rows and points is not None:
            curves.append((name, points))
    return curves_section(curves, "Each label, of the slides where it is known.") if curves else ""


def predictions_section(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of predictions.csv as a table."""
    columns = list(rows[0])
    numeric = {name for name in columns if all(isinstance(row[name], int | float | None) for row in rows)}
    head = [head_cell(name.replace("_", " "), name in numeric) for name in columns]
    body = []
    for row in rows:
        cells = [_cell(row[name], name in numeric) for name in columns[1:]]
        body.append(f'<tr><th scope="row">{escape(str(row[columns[0]]))}</th>{"".join(cells)}</tr>')
    note = "<p>An empty cell: the table or the model does not tell.</p>"
    return section("Predictions", note + "\n" + table(head, body, "predictions"))


def _cell(value: Any, number: bool) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    kind = ' class="number"' if number else ""
    return f"<td{kind}>{escape(text)}</td>"
