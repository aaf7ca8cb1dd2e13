"""The campaign's results as tables: all cases to print, and totals for docs/stops.md."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from .case import FELL, HELD, NOT_RUN, WAYS, Outcome
from .cases import CASES

BEGIN, END = "<!-- chaos: begin, written by python -m tests.chaos.campaign --page -->", "<!-- chaos: end -->"
NEW_SECTION = "## What was tried\n"


@dataclass(frozen=True)
class Line:
    """One line of a file of results."""

    fault: str
    engine: str
    ranks: int
    at: str
    rank: int | None
    outcome: Outcome
    commit: str

    @property
    def key(self) -> str:
        """The case's words, each case's different."""
        hit = "" if self.rank is None else f" of rank {self.rank}"
        return f"{self.fault}/{self.engine}-{self.ranks}/{self.at}{hit}"


def read_results(path: Path) -> dict[str, Line]:
    """The last line of each case, by its key; none where there is no file."""
    results: dict[str, Line] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        row = json.loads(text)
        line = Line(**{**row, "outcome": Outcome(**row["outcome"])})
        results[line.key] = line
    return results


def write_line(path: Path, line: Line) -> None:
    """Append one."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(line)) + "\n")


def write_table(results: Path, page: Path) -> None:
    """Put totals, and the cases that fell, between the page's marks; at its end where it has none."""
    text = page.read_text(encoding="utf-8")
    table = f"{BEGIN}\n\n{markdown(read_results(results).values(), each=False)}\n{END}"
    if BEGIN in text and END in text:
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        page.write_text(f"{before}{table}{after}", encoding="utf-8")
    else:
        page.write_text(f"{text.rstrip()}\n\n{NEW_SECTION}\n{table}\n", encoding="utf-8")


def markdown(lines: Iterable[Line], *, each: bool = True) -> str:
    """Totals by fault and by way of falling; then a row a case; and what was not run.

    Args:
        lines: the results to tell.
        each: False leaves out the cases that held.
    """
    lines = list(lines)
    seconds = sum(line.outcome.seconds for line in lines)
    commits = ", ".join(sorted({line.commit for line in lines}))
    parts = [f"Commit {commits}: {len(lines)} cases, {seconds / 60:.0f} minutes of the clock.", _totals(lines)]
    shown = [line for line in lines if each or line.outcome.status != HELD]
    if shown:
        head = "| fault | engine | ranks | moment | outcome | seconds | in words |\n|---|---|---|---|---|---|---|"
        parts.append("\n".join([head, *map(_row, shown)]))
    tried = {line.key for line in lines}
    missing = [case.key for case in CASES if case.key not in tried]
    if missing:
        parts.append(f"Of {len(CASES)} cases {len(missing)} were not tried yet.")
    return "\n\n".join(parts) + "\n"


def _totals(lines: list[Line]) -> str:
    rows = [f"| fault | cases | held | not run | {' | '.join(WAYS)} |", f"|---|---|---|---|{'---|' * len(WAYS)}"]
    groups = {fault: [line for line in lines if line.fault == fault] for fault in {line.fault: 0 for line in lines}}
    for name, some in [*groups.items(), ("all", lines)]:
        counts = [sum(line.outcome.status == status for line in some) for status in (HELD, NOT_RUN)]
        ways = [sum(way in line.outcome.ways for line in some) for way in WAYS]
        rows.append(f"| {name} | {len(some)} | {' | '.join(map(str, [*counts, *ways]))} |")
    return "\n".join(rows)


def _row(line: Line) -> str:
    at = line.at if line.rank is None else f"{line.at}, rank {line.rank}"
    outcome = line.outcome
    words = outcome.status if outcome.status != FELL else ", ".join(outcome.ways)
    detail = outcome.detail.replace("|", "\\|").replace("\n", " ")[:300]
    return f"| {line.fault} | {line.engine} | {line.ranks} | {at} | {words} | {outcome.seconds:.0f} | {detail} |"
