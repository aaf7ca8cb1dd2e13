"""Tables in JSON, JSON lines, Parquet and Arrow, read in place: patients' data is copied to no cache."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, each with every column; None where a row has no value.

    JSON is a list of objects, objects line by line, or an object of columns (lists, or pandas' objects by index).

    Raises:
        ValueError: the file is of no such form, or torn; names it.
    """
    suffix = path.suffix.lower()
    try:
        rows = _read_json(path) if suffix in (".json", ".jsonl") else _read_arrow(path, suffix)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"table must be whole {suffix.removeprefix('.')}, got {error} ({path})") from error
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def _read_arrow(path: Path, suffix: str) -> list[dict[str, Any]]:
    if suffix == ".parquet":
        table = pq.ParquetFile(path).read()
    else:
        with pa.memory_map(str(path)) as file:
            try:
                reader = pa.ipc.open_stream(file)  # as `datasets` writes it
            except pa.ArrowInvalid:
                reader = pa.ipc.open_file(file)
            table = reader.read_all()
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _read_json(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(found, dict):
        found = _of_columns(found)
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError("something else than objects, one a row")
    return found


def _of_columns(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an object of columns; an object of values is the one row of a file of lines."""
    columns = [list(value.values()) if isinstance(value, dict) else value for value in found.values()]
    if not any(isinstance(column, list) for column in columns):
        return [found]
    if not all(isinstance(column, list) for column in columns) or len(set(map(len, columns))) > 1:
        raise ValueError("columns of different lengths")
    return [dict(zip(found, values, strict=True)) for values in zip(*columns, strict=True)]
