"""The sweep's results as the table of docs/modules.md."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from ds_wsi.partition.policy import MODES

from .measure import STATUSES, Case, Outcome

BEGIN, END = "<!-- zoo: begin, written by python -m tests.zoo.sweep -->", "<!-- zoo: end -->"
COLUMNS = (("batch", "train"), ("batch", "eval"), ("batch", "draws"), ("spatial", "train"))
HEADS = ("tiles, training", "evaluation", "dropout and drop path", "rows of an image")
CHECKED = tuple(status for status in STATUSES if status != "not run")
NEW_PAGE = "# Modules that nobody here wrote\n\n## What was tried\n"


@dataclass(frozen=True)
class Line:
    """One line of a file of results."""

    case: Case
    outcome: Outcome
    commit: str
    torch: str


def read_results(path: Path) -> dict[str, Line]:
    """The last line of each case, by its key; none where there is no file."""
    results: dict[str, Line] = {}
    for text in path.read_text().splitlines() if path.is_file() else []:
        row = json.loads(text)
        case = Case(**{field.name: row[field.name] for field in fields(Case)})
        outcome = Outcome(**{field.name: row[field.name] for field in fields(Outcome)})
        results[case.key] = Line(case, outcome, row["commit"], row["torch"])
    return results


def write_table(results: Path, page: Path) -> None:
    """Put the table between the page's marks; at its end where it has none."""
    text = page.read_text() if page.is_file() else NEW_PAGE
    table = f"{BEGIN}\n\n{markdown(read_results(results).values())}\n{END}"
    if BEGIN in text and END in text:
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        page.write_text(f"{before}{table}{after}")
    else:
        page.write_text(f"{text.rstrip()}\n\n{table}\n")


def markdown(lines: Iterable[Line]) -> str:
    """Totals, the table by model, and the sentence of each refusal or fault."""
    lines = list(lines)
    if not lines:
        return "No results.\n"
    reasons: dict[str, list[str]] = {}
    rows = []
    for model in sorted({line.case.model for line in lines}, key=_order):
        mine = [line for line in lines if line.case.model == model]
        norms = max(line.outcome.norms for line in mine)
        cells = [_cell([line for line in mine if _column(line.case) == column], reasons) for column in COLUMNS]
        rows.append(f"| {model} | {norms or ''} | " + " | ".join(cells) + " |")
    modes = {line.case.mode for line in lines}
    versions = ", ".join(sorted({line.commit for line in lines}))
    parts = [
        f"Commit {versions}, torch {', '.join(sorted({line.torch for line in lines}))}. {len(rows)} models, "
        f"{len(lines)} comparisons. Modes: {', '.join(mode for mode in MODES if mode in modes)}.",
        _totals(lines),
        f"| model | BatchNorms | {' | '.join(HEADS)} |\n|---|---|{'---|' * len(HEADS)}\n" + "\n".join(rows),
    ]
    if reasons:
        listed = "\n".join(f"- [{number}] {text} ({len(who)})" for number, (text, who) in enumerate(reasons.items(), 1))
        parts.append(f"Reasons, and how many comparisons have each:\n\n{listed}")
    return "\n\n".join(parts) + "\n"


def _order(model: str) -> tuple[int, str]:
    libraries = ("pathology", "timm", "torchvision", "transformers")
    return libraries.index(model.split("/")[0]), model


def _column(case: Case) -> tuple[str, str]:
    return case.axis, "draws" if case.draws else "train" if case.train else "eval"


def _totals(lines: list[Line]) -> str:
    """Comparisons by outcome, and models of which all comparisons are exact."""
    rows = []
    for axis, setting in COLUMNS:
        some = [line for line in lines if _column(line.case) == (axis, setting)]
        counts = Counter(line.outcome.status for line in some if line.outcome.status in CHECKED)
        models = {line.case.model for line in some if line.outcome.status in CHECKED}
        bad = {line.case.model for line in some if line.outcome.status in CHECKED and line.outcome.status != "exact"}
        numbers = " | ".join(str(counts[status]) for status in CHECKED)
        head = HEADS[COLUMNS.index((axis, setting))]
        rows.append(f"| {head} | {len(models)} | {len(models - bad)} | {numbers} |")
    return (
        f"| | models | exact in all that was run | {' | '.join(CHECKED)} |\n|---|---|---|{'---|' * len(CHECKED)}\n"
        + "\n".join(rows)
    )


def _cell(lines: list[Line], reasons: dict[str, list[str]]) -> str:
    """Modes by outcome; "exact" with the largest error and its noise."""
    lines = sorted(lines, key=lambda line: MODES.index(line.case.mode))
    checked = [line for line in lines if line.outcome.status in CHECKED]
    parts = []
    exact = [line for line in checked if line.outcome.status == "exact"]
    if exact:
        worst = max(line.outcome.error for line in exact)
        noise = max(line.outcome.noise for line in exact)
        modes = "" if len(exact) == len(checked) else f" in {', '.join(line.case.mode for line in exact)}"
        parts.append(f"exact{modes} ({worst:.0e}, noise {noise:.0e})")
    for status in CHECKED[1:]:
        some = [line for line in checked if line.outcome.status == status]
        numbers = sorted({_number(line, reasons) for line in some})
        if some:
            modes = "" if len(some) == len(checked) else f" in {', '.join(line.case.mode for line in some)}"
            parts.append(f"{status}{modes} {' '.join(f'[{number}]' for number in numbers)}")
    return "; ".join(parts)


def _number(line: Line, reasons: dict[str, list[str]]) -> int:
    text = line.outcome.detail.replace("|", "\\|").replace("<", "\\<")
    reasons.setdefault(text, []).append(line.case.key)
    return list(reasons).index(text) + 1
