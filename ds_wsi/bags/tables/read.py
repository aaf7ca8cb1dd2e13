"""Any file of a table, as texts by heading: CSV and TSV, JSON, Parquet, Arrow, datasets saved by `datasets`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ds_wsi.bags.delimited import read_delimited
from ds_wsi.bags.problems import ManifestError
from ds_wsi.runtime.files import read_file, read_object, require_file
from ds_wsi.runtime.log import logger

DELIMITED = (".csv", ".tsv")
JSON = (".json", ".jsonl", ".ndjson")
ARROW = (".parquet", ".arrow", ".feather")
SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")
Value = str | int | float | bool | None


@dataclass(frozen=True)
class TableRow:
    """One row: texts by heading, "" where there is nothing; and where it is, such as "row 3"."""

    values: Mapping[str, str]
    place: str

    def __getitem__(self, heading: str) -> str:
        return self.values.get(heading, "")


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        headings: heads of the columns, in the file's order.
        rows: the cells of each row, in the file's order.
        names: heading of a column that `datasets` keeps as ClassLabel -> its names in their order.
        decimal_comma: 0,25 is a number in it.
    """

    headings: tuple[str, ...]
    rows: tuple[TableRow, ...]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    decimal_comma: bool = False

    def renamed(self, headings: Mapping[str, str]) -> "Table":
        """The table with other headings, old -> new."""
        return replace(
            self,
            headings=tuple(headings.get(heading, heading) for heading in self.headings),
            rows=tuple(
                TableRow({headings.get(key, key): value for key, value in row.values.items()}, row.place)
                for row in self.rows
            ),
            names={headings.get(key, key): names for key, names in self.names.items()},
        )

    def with_column(self, heading: str, values: Sequence[str]) -> "Table":
        """The table with one more column, or with another in its place."""
        rows = (
            TableRow({**row.values, heading: value}, row.place) for row, value in zip(self.rows, values, strict=True)
        )
        headings = self.headings if heading in self.headings else (*self.headings, heading)
        return replace(self, headings=headings, rows=tuple(rows))


def read_table_file(path: str | Path) -> Table:
    """Read a table of slides from any file that holds one.

    Numbers become texts: whole ones without a point, because pandas makes floats of a column of whole numbers with
    gaps. NaN and null are "". Rows are numbered by the line of a CSV, elsewhere from 1.

    Raises:
        ManifestError: no such file, or of a kind that is not read; names what to do.
        ValueError: see `read_delimited`.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.exists():
        raise _error(path, "file must exist, got none. HINT: check --manifest")
    if path.is_dir():
        return _read_saved(path)
    if suffix in DELIMITED:
        headings, lines = read_delimited(path)
        rows = tuple(TableRow(line.values, f"row {line.line}") for line in lines)
        return Table(tuple(headings), rows, decimal_comma=any(line.decimal_comma for line in lines))
    if suffix in JSON:
        return _of_records(_read_json(path))
    if suffix in ARROW:
        return _read_arrow(path)
    hint = "write the table as CSV in UTF-8"
    if suffix in SPREADSHEETS:
        hint = "save the sheet as CSV UTF-8 (File, Save as), and give that file"
    suffixes = ", ".join((*DELIMITED, *JSON, *ARROW))
    raise _error(path, f"must be {suffixes} or a dataset's folder, got {path.suffix!r}. HINT: {hint}")


def as_text(value: Any) -> str:
    """A value as a CSV would hold it; what is no text, number or truth value is ""."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if isinstance(value, list | dict | bytes) else str(value).strip()


def _error(path: Path, problem: str) -> ManifestError:
    return ManifestError(f"manifest {path}", [f"{problem}."])


def _of_records(records: Sequence[Mapping[str, Any]]) -> Table:
    headings = tuple(dict.fromkeys(str(key).strip() for record in records for key in record))
    rows = (
        TableRow({str(key).strip(): as_text(value) for key, value in record.items()}, f"row {number}")
        for number, record in enumerate(records, 1)
    )
    return Table(headings, tuple(rows))


def _read_json(path: Path) -> list[dict[str, Any]]:
    """Records: a list of them, one per line, or a column after the other as pandas writes by default."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise _error(path, f"each name of a record must be given once, got {', '.join(twice)} twice. HINT: rename")
        return dict(pairs)

    try:
        text = read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _error(path, f"must be JSON in UTF-8, got {error}. HINT: write it anew in UTF-8") from error
    try:
        if path.suffix.lower() == ".json" and text.lstrip()[:1] in ("[", "{"):
            content = _json_of(text, once)
        else:
            content = [json.loads(line, object_pairs_hook=once) for line in text.splitlines() if line.strip()]
    except ManifestError:
        raise
    except (ValueError, RecursionError) as error:
        raise _error(path, f"must be JSON, got {error}. HINT: a list of records, or one record per line") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if isinstance(content, dict):
        columns = {
            name: list(values.values()) if isinstance(values, dict) else values for name, values in content.items()
        }
        if all(isinstance(values, list) for values in columns.values()):
            if len({len(values) for values in columns.values()}) > 1:
                counts = ", ".join(f"{len(values)} in {name}" for name, values in columns.items())
                raise _error(path, f"columns must be of one length, got {counts}. HINT: write the table anew")
            content = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise _error(path, "must hold records of one slide each, got other values. HINT: a list of objects")
    return content


def _json_of(text: str, once: Any) -> Any:
    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError:
        # Records one per line, in a file that is called .json.
        return [json.loads(line, object_pairs_hook=once) for line in text.splitlines() if line.strip()]


def _read_arrow(path: Path) -> Table:
    import pyarrow  # here, because a CSV does not need it
    import pyarrow.feather
    import pyarrow.parquet

    try:
        require_file(path)
        if path.suffix.lower() == ".parquet":
            columns = _plain_columns(pyarrow.parquet.read_schema(path))
            return _of_arrow(pyarrow.parquet.read_table(path, columns=columns))
        return _of_arrow(_read_ipc(path))
    except ManifestError:
        raise
    # Of a damaged file Arrow raises whatever comes to hand, and so does what is made of its words.
    except Exception as error:
        raise _error(path, f"must be a whole {path.suffix} file, got {error}. HINT: write it anew") from error


def _plain_columns(schema: Any) -> list[str]:
    """The columns that hold one value per row: not the images or features that a dataset may hold beside."""
    from pyarrow import types

    large = (types.is_nested, types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    return [field.name for field in schema if not any(is_it(field.type) for is_it in large)]


def _read_ipc(path: Path) -> Any:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            return pyarrow.ipc.open_file(source).read_all()
        except pyarrow.ArrowInvalid:  # `datasets` writes streams
            source.seek(0)
            return pyarrow.ipc.open_stream(source).read_all()


def _of_arrow(table: Any) -> Table:
    """The texts of a pyarrow.Table, the names of its ClassLabels in the place of their numbers."""
    table.validate(full=True)  # Arrow believes its files: one damaged offset would end the process
    names = _class_names(table.schema)
    columns: dict[str, list[str]] = {}
    for heading, column in zip(table.column_names, table.columns, strict=True):
        key = heading.strip()
        if key in columns or key == "__index_level_0__":  # of pandas
            if key in columns:
                raise ValueError(f"each heading must be given once, got {key} twice. HINT: rename or delete one.")
            continue
        columns[key] = [_named(value, names.get(key)) for value in column.to_pylist()]
    rows = (
        TableRow(dict(zip(columns, values, strict=True)), f"row {number}")
        for number, values in enumerate(zip(*columns.values(), strict=True), 1)
    )
    return Table(tuple(columns), tuple(rows), names)


def _named(value: Any, names: Sequence[str] | None) -> str:
    if names is None or value is None:
        return as_text(value)
    return names[value] if 0 <= value < len(names) else ""  # -1: `datasets` has no label for the row


def _class_names(schema: Any) -> dict[str, tuple[str, ...]]:
    """Column -> names, of what `datasets` wrote about its ClassLabels into the file."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return {}
    features = json.loads(metadata).get("info", {}).get("features") or {}
    return {
        column.strip(): tuple(feature["names"])
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def _read_saved(path: Path) -> Table:
    """A folder of `save_to_disk`: a dataset, or a DatasetDict, whose splits become the column `split`."""
    import datasets  # here, because it takes a second that other files do not need

    try:
        _require_own_files(path)
        dataset = datasets.load_from_disk(str(path))
        for part in dataset.values() if isinstance(dataset, datasets.DatasetDict) else [dataset]:
            part.data.validate(full=True)  # before a row is taken: Arrow believes its files
    except FileNotFoundError as error:
        holds = ", ".join(sorted(entry.name for entry in path.iterdir())[:3]) or "nothing"
        raise _error(
            path,
            f"folder must be one that `datasets` saved (save_to_disk), got {holds}. "
            "HINT: give the table's file, or that folder",
        ) from error
    except Exception as error:  # of a damaged folder `datasets` raises whatever comes to hand
        raise _error(path, f"must be a whole folder of save_to_disk, got {error}. HINT: save it anew") from error
    if not isinstance(dataset, datasets.DatasetDict):
        return _of_arrow(_arrow_of(dataset))
    parts = {name: _of_arrow(_arrow_of(part)) for name, part in dataset.items()}
    if list(parts) == ["train"]:
        logger.info("%s: its only split, train, is taken as the whole cohort", path)
        return parts["train"]
    return _joined(path, parts)


def _require_own_files(path: Path) -> None:
    """Refuse pipes, which the library would wait for, and data that lie elsewhere: it opens what the folder names."""
    for file in path.rglob("*"):
        if not file.is_dir():
            require_file(file)
    for state in path.rglob("state.json"):
        for entry in read_object(state, "state.json")["_data_files"]:
            if Path(entry["filename"]).name != entry["filename"]:
                raise ValueError(f"data outside of the folder, {entry['filename']}")


def _arrow_of(dataset: Any) -> Any:
    """The rows that the dataset selects, without what no field of a table holds; no image or audio is decoded."""
    columns = _plain_columns(dataset.features.arrow_schema)
    table = dataset.select_columns(columns).with_format("arrow")[:]
    return table.replace_schema_metadata(dataset.features.arrow_schema.metadata)


def _joined(path: Path, parts: Mapping[str, Table]) -> Table:
    """The rows of all splits, each with its split's name."""
    first = next(iter(parts.values()))
    rows = []
    for name, part in parts.items():
        if set(part.headings) != set(first.headings) or part.names != first.names:
            raise _error(path, f"splits must have the same columns and classes, got others in {name}. HINT: write anew")
        for row in part.rows:
            if row["split"] not in ("", name):
                raise _error(
                    path,
                    f"column split must be the dataset's own, {name}, got {row['split']!r} ({name}, {row.place}). "
                    "HINT: drop the column, or save one dataset in the place of a DatasetDict",
                )
            rows.append(TableRow({**row.values, "split": name}, f"{name}, {row.place}"))
    headings = first.headings if "split" in first.headings else (*first.headings, "split")
    return Table(headings, tuple(rows), {key: names for key, names in first.names.items() if key != "split"})
