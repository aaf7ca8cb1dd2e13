"""CSV and TSV files as people and spreadsheets write them: marks of order, CRLF, semicolons, spaces around values."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

TAB_SUFFIXES = (".tsv", ".txt")
SHOWN_ROWS = 5  # in messages


@dataclass(frozen=True)
class DelimitedRow:
    """One row: its values by heading, stripped, "" where it is too short; and the line of the file it ends on."""

    values: dict[str, str]
    line: int

    def __getitem__(self, heading: str) -> str:
        return self.values[heading]


def read_delimited(path: str | Path) -> tuple[list[str], list[DelimitedRow]]:
    """Read the headings and the rows of a table; empty lines are left out.

    Values are divided by tabs in .tsv and .txt; elsewhere by commas, or by semicolons (tabs) where the heading has
    these and no comma, as a spreadsheet writes them where the comma is the decimal sign.

    Raises:
        ValueError: the file is not UTF-8, or rows have more values than there are headings; names the lines.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"table must be text in UTF-8, got byte 0x{error.object[error.start]:02x} at position {error.start} "
            f"({path}). HINT: save it as CSV UTF-8."
        ) from error
    reader = csv.reader(io.StringIO(text), delimiter=_delimiter(path, text.partition("\n")[0]))
    headings = [heading.strip() for heading in next(reader, [])]
    rows, too_long = [], []
    for cells in reader:
        values = [cell.strip() for cell in cells]
        if any(values[len(headings) :]):
            too_long.append(reader.line_num)
        if values:
            padded = values + [""] * (len(headings) - len(values))
            rows.append(DelimitedRow(dict(zip(headings, padded, strict=False)), reader.line_num))
    if too_long:
        shown = ", ".join(map(str, too_long[:SHOWN_ROWS])) + (", ..." if len(too_long) > SHOWN_ROWS else "")
        raise ValueError(
            f"rows must have as many values as there are headings, {len(headings)}, got more in {len(too_long)} "
            f"({path}, row {shown}). HINT: a value that holds the delimiter is written in double quotes."
        )
    return headings, rows


def _delimiter(path: Path, heading: str) -> str:
    if path.suffix.lower() in TAB_SUFFIXES:
        return "\t"
    return next((sign for sign in ",;\t" if sign in heading), ",")
