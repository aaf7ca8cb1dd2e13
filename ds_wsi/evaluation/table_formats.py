"""Result tables as text: CSV with every digit, and Markdown, LaTeX and HTML in the form of the papers' tables."""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

from ds_wsi.evaluation.grouping import BASELINE, END_TO_END, Row, Statistic, Table, is_error
from ds_wsi.evaluation.page import page, section
from ds_wsi.evaluation.report import METRIC_TITLES

TITLES = METRIC_TITLES | {"quadratic_weighted_kappa": "QWK"}  # short, for a column
DIFFERENCE, NOTHING = "difference", "-"
IN_UNITS = ("mae", "rmse")  # errors in the unit of the target
Skipped = Sequence[tuple[Path, str]]

CSV_COLUMNS = (
    *("dataset", "encoder", "aggregator", "evaluation", "settings", "training", "metric"),
    *("mean", "std", "n_runs", "difference_to_frozen", "runs"),
)
LATEX_ESCAPES = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
}


@dataclass(frozen=True)
class Entry:
    """A cell's text, whether it is the best value, and whether it is a number."""

    text: str
    best: bool = False
    number: bool = True


def to_csv(tables: Sequence[Table]) -> str:
    """One line per dataset, method, training and metric, in fractions with every digit; what is undefined is empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for table in tables:
        for row in table.rows:
            for training in (name for name in table.trainings if name in row.cells):
                cell = row.cells[training]
                record = cell.runs[0].record
                lead = [table.dataset, record.encoder, record.aggregator, row.protocol, row.variant, training]
                folders = " ".join(str(run.path) for run in cell.runs)
                for metric in table.metrics:
                    statistic = cell.statistics[metric]
                    change = row.difference(metric) if training == END_TO_END else math.nan
                    numbers = [_digits(statistic.mean), _digits(statistic.std), statistic.n, _digits(change)]
                    writer.writerow([*lead, metric, *numbers, folders])
    return buffer.getvalue()


def _digits(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def to_markdown(tables: Sequence[Table], skipped: Skipped) -> str:
    """A heading, a line of explanation and one table per dataset, then the folders that took no part."""
    parts = ["# Results\n"]
    for table in tables:
        names = [*_lead_names(table), *(f"{_title(metric)} {name}" for metric, name in _columns(table)), "Runs"]
        lead = len(_lead_names(table))
        lines = [_markdown_line(names), _markdown_line(["---"] * lead + ["---:"] * (len(names) - lead), escaped=True)]
        for row in table.rows:
            cells = [_markdown(entry.text) for entry in _entries(table, row)]
            marked = [
                f"**{text}**" if entry.best else text for entry, text in zip(_entries(table, row), cells, strict=True)
            ]
            lines.append(_markdown_line(marked, escaped=True))
        parts.append(f"## {_markdown(table.dataset)}\n\n{_markdown(_caption(table))}\n\n" + "\n".join(lines) + "\n")
    if skipped:
        lines = [f"- {_markdown(str(path))}: {_markdown(reason)}" for path, reason in skipped]
        parts.append(f"## Left out\n\n{_left_out(skipped)}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _markdown_line(cells: Iterable[str], escaped: bool = False) -> str:
    return "| " + " | ".join(cell if escaped else _markdown(cell) for cell in cells) + " |"


def _markdown(text: str) -> str:
    text = " ".join(escape(text, quote=False).split())
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("`", "\\`")


def to_latex(tables: Sequence[Table], skipped: Skipped) -> str:
    r"""One booktabs table per dataset, to be `\input`; the folders that took no part are comments."""
    parts = ["% needs \\usepackage{booktabs}"]
    parts += [f"% left out: {' '.join(f'{path}: {reason}'.split())}" for path, reason in skipped]
    parts += [_latex_table(table) for table in tables]
    return "\n".join(parts) + "\n"


def _latex_table(table: Table) -> str:
    lead, groups = _lead_names(table), _column_groups(table)
    titles, rules, start = [""] * len(lead), [], len(lead) + 1
    for metric, names in groups:
        titles.append(rf"\multicolumn{{{len(names)}}}{{c}}{{{_latex(_title(metric))}}}")
        rules.append(rf"\cmidrule(lr){{{start}-{start + len(names) - 1}}}")
        start += len(names)
    names = [*lead, *(name for _, names in groups for name in names), "Runs"]
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{_latex(f'{table.dataset}. {_caption(table)}')}}}",
            rf"  \begin{{tabular}}{{{'l' * len(lead)}{'r' * (len(names) - len(lead))}}}",
            r"    \toprule",
            f"    {' & '.join([*titles, ''])} \\\\",
            f"    {' '.join(rules)}",
            f"    {' & '.join(_latex(name) for name in names)} \\\\",
            r"    \midrule",
            *(f"    {' & '.join(map(_latex_entry, _entries(table, row)))} \\\\" for row in table.rows),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
        ]
    )


def _latex_entry(entry: Entry) -> str:
    if entry.text == NOTHING or not entry.number:
        return "--" if entry.number else _latex(entry.text)
    value, space, note = entry.text.partition(" (")
    value = value.replace("±", r"\pm")
    return (rf"$\mathbf{{{value}}}$" if entry.best else f"${value}$") + space + note


def _latex(text: str) -> str:
    return "".join(LATEX_ESCAPES.get(sign, sign) for sign in " ".join(text.split()))


def to_html(tables: Sequence[Table], skipped: Skipped) -> str:
    """One offline page in the style of the run's report."""
    body = ["<h1>Results</h1>", *(section(table.dataset, _html_table(table)) for table in tables)]
    if skipped:
        items = "\n".join(f"<dt>{escape(str(path))}</dt><dd>{escape(reason)}</dd>" for path, reason in skipped)
        body.append(section("Left out", f"<p>{_left_out(skipped)}</p>\n<dl>\n{items}\n</dl>"))
    return page("Results", "\n".join(body))


def _html_table(table: Table) -> str:
    lead, groups = _lead_names(table), _column_groups(table)
    titles = "".join(f'<th scope="col" rowspan="2">{escape(name)}</th>' for name in lead)
    titles += "".join(
        f'<th scope="colgroup" class="group" colspan="{len(names)}">{escape(_title(metric))}</th>'
        for metric, names in groups
    )
    titles += '<th scope="col" rowspan="2" class="number">Runs</th>'
    names = "".join(f'<th scope="col" class="number">{escape(name)}</th>' for _, names in groups for name in names)
    rows = "\n".join(f"<tr>{''.join(map(_html_entry, _entries(table, row)))}</tr>" for row in table.rows)
    return (
        f'<p class="note">{escape(_caption(table))}</p>\n<div class="scroll"><table class="results">\n'
        f"<thead><tr>{titles}</tr>\n<tr>{names}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def _html_entry(entry: Entry) -> str:
    text = f"<strong>{escape(entry.text)}</strong>" if entry.best else escape(entry.text)
    return f'<td class="number">{text}</td>' if entry.number else f"<td>{text}</td>"


def _title(metric: str) -> str:
    target, _, name = metric.rpartition(".")
    return f"{target}: {TITLES.get(name, name)}" if target else TITLES.get(name, name)


def _factor(metric: str) -> float:
    """What a metric is shown times: 1 of an error in the target's unit."""
    return 1.0 if metric.rpartition(".")[2] in IN_UNITS else 100.0


def _lead_names(table: Table) -> list[str]:
    """Evaluation and settings have columns only where rows differ in them."""
    names = ["Method"]
    names += ["Evaluation"] if len({row.protocol for row in table.rows}) > 1 else []
    return names + (["Settings"] if any(row.variant for row in table.rows) else [])


def _columns(table: Table) -> Iterator[tuple[str, str]]:
    names = [*table.trainings, *([DIFFERENCE] if table.has_difference else [])]
    return ((metric, name) for metric in table.metrics for name in names)


def _column_groups(table: Table) -> list[tuple[str, list[str]]]:
    return [(metric, [name for _, name in group]) for metric, group in groupby(_columns(table), lambda pair: pair[0])]


def _entries(table: Table, row: Row) -> list[Entry]:
    """The row's cells, in the order of the columns."""
    lead = {"Method": row.method, "Evaluation": row.protocol, "Settings": row.variant}
    entries = [Entry(lead[name], number=False) for name in _lead_names(table)]
    for metric, name in _columns(table):
        if name == DIFFERENCE:
            change = row.difference(metric)
            entries.append(Entry(NOTHING if math.isnan(change) else f"{_factor(metric) * change:+.2f}"))
        elif name not in row.cells:
            entries.append(Entry(NOTHING))
        else:
            cell = row.cells[name]
            text = _statistic_text(cell.statistics[metric], len(cell.runs), _factor(metric))
            entries.append(Entry(text, best=table.is_best(row, name, metric)))
    counts = [str(len(row.cells[name].runs)) if name in row.cells else NOTHING for name in table.trainings]
    return [*entries, Entry(" / ".join(counts))]


def _statistic_text(statistic: Statistic, n_runs: int, factor: float) -> str:
    if statistic.n == 0:
        return NOTHING
    text = f"{factor * statistic.mean:.2f}"
    text += "" if math.isnan(statistic.std) else f" ± {factor * statistic.std:.2f}"
    return text if statistic.n == n_runs else f"{text} ({statistic.n} of {n_runs})"


def _caption(table: Table) -> str:
    cells = [cell for row in table.rows for cell in row.cells.values()]
    several = any(len(cell.runs) > 1 for cell in cells)
    what = "Mean ± sample standard deviation over the runs, in %" if several else "In %"
    if any(statistic.n < len(cell.runs) for cell in cells for statistic in cell.statistics.values()):
        what += "; (n of m): only n of the m runs define the metric"
    if any(_factor(metric) == 1 for metric in table.metrics):
        what += "; errors in the target's unit"
    errors = [_title(metric) for metric in table.metrics if is_error(metric)]
    best = f"best mean (the lowest of {', '.join(errors)})" if errors else "highest mean"
    sentences = [what, f"Bold: the {best} of the dataset under the same evaluation"]
    if table.has_difference:
        sentences.append(f"Difference: {END_TO_END} minus {BASELINE}, in percentage points")
    protocols = {row.protocol for row in table.rows}
    sentences += [f"Evaluation: {protocols.pop()}"] if len(protocols) == 1 else []
    if len(table.trainings) > 1:
        sentences.append(f"Runs: {' / '.join(table.trainings)}")
    return ". ".join(sentences) + "."


def _left_out(skipped: Skipped) -> str:
    return f"{len(skipped)} {'folder takes' if len(skipped) == 1 else 'folders take'} no part in the tables."
