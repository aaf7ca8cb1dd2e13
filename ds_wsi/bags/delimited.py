"""CSV and TSV files as people and spreadsheets write them: marks of order, CRLF, semicolons, spaces around values."""

import csv
import io
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from ds_wsi.runtime.files import read_file

TAB_SUFFIXES = (".tsv", ".txt")
SHOWN_ROWS = 5  # in messages
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?', re.IGNORECASE)  # which Excel writes and reads as the first line


@dataclass(frozen=True)
class DelimitedRow:
    """One row: its values by heading, stripped, "" where it is too short; and the line of the file it ends on.

    Where the file divides values by another sign than the comma, that is left to numbers: 0,25.
    """

    values: dict[str, str]
    line: int
    decimal_comma: bool = False

    def __getitem__(self, heading: str) -> str:
        return self.values[heading]


def read_delimited(path: str | Path) -> tuple[list[str], list[DelimitedRow]]:
    """Read the headings and the rows of a table; empty lines, rows of delimiters and empty last columns are left out.

    Values are divided by the sign of a first line `sep=;`, by tabs in .tsv and .txt; elsewhere by commas, or by
    semicolons (tabs) where the heading has these and no comma, as a spreadsheet writes them where the comma is the
    decimal sign. A single column may have no heading, as pandas writes the index of a table.

    Raises:
        ValueError: the file is not UTF-8, a heading is given twice, or rows have more values than there are headings;
            names the columns or the lines.
    """
    path = Path(path)
    text = read_utf8(path)
    first, _, rest = text.partition("\n")
    separator = SEPARATOR_LINE.fullmatch(first.strip())
    delimiter = separator[1] if separator else _delimiter(path, first)
    skipped = 1 if separator else 0
    try:
        reader = csv.reader(io.StringIO(rest if separator else text), delimiter=delimiter)
        headings = [heading.strip() for heading in next(reader, [])]
        cells, lines, too_long = [], [], []
        for row in reader:
            values = [cell.strip() for cell in row]
            if any(values[len(headings) :]):
                too_long.append(reader.line_num + skipped)
            if any(values):
                cells.append((values + [""] * len(headings))[: len(headings)])
                lines.append(reader.line_num + skipped)
    except (csv.Error, TypeError) as error:  # a value without an end, a sign that divides nothing
        raise ValueError(
            f"table must be CSV, got {error} ({path}). HINT: a value in double quotes must end with one."
        ) from error
    if too_long:
        shown = ", ".join(map(str, too_long[:SHOWN_ROWS])) + (", ..." if len(too_long) > SHOWN_ROWS else "")
        raise ValueError(
            f"rows must have as many values as there are headings, {len(headings)}, got more in {len(too_long)} "
            f"({path}, row {shown}). HINT: a value that holds the delimiter is written in double quotes."
        )
    # A spreadsheet keeps the columns that were once filled.
    kept = [column for column, heading in enumerate(headings) if heading or any(row[column] for row in cells)]
    headings = [headings[column] for column in kept]
    _require_once(headings, kept, path)
    rows = [
        DelimitedRow(dict(zip(headings, (row[column] for column in kept), strict=True)), line, delimiter != ",")
        for row, line in zip(cells, lines, strict=True)
    ]
    return headings, rows


def read_utf8(path: Path) -> str:
    """The text of a file, without its mark of order.

    Raises:
        ValueError: it is no file, or not UTF-8; names it and the byte.
        OSError: it is missing, or not readable.
    """
    try:
        return read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"table must be text in UTF-8, got byte 0x{error.object[error.start]:02x} at position {error.start} "
            f"({path}). HINT: save it as CSV UTF-8."
        ) from error


def _require_once(headings: list[str], columns: list[int], path: Path) -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for heading, column in zip(headings, columns, strict=True):
        places[heading].append(str(column + 1))
    twice = [
        f"{heading or 'none'} (columns {', '.join(numbers)})" for heading, numbers in places.items() if len(numbers) > 1
    ]
    if twice:
        raise ValueError(
            f"each heading must be given once, got {'; '.join(twice)} ({path}). "
            "HINT: rename or delete all but one of these columns."
        )


def _delimiter(path: Path, heading: str) -> str:
    if path.suffix.lower() in TAB_SUFFIXES:
        return "\t"
    return next((sign for sign in ",;\t" if sign in heading), ",")
