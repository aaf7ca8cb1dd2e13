"""Tables that are no CSV: the same rows in every form, and nothing written for them."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ds_wsi.bags.manifest import read_manifest
from ds_wsi.bags.tables.read import read_table_file

ROWS = [
    {"slide_id": "007", "path": "a.svs", "label": "x", "mpp": 0.5, "center": None},
    {"slide_id": "8", "path": "b.svs", "label": "y", "mpp": None, "center": "3"},
]
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}


def write_stream(path):
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)


def write_file(path):
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)


FORMS = {
    "records.json": lambda path: path.write_text(json.dumps(ROWS)),
    "lines.json": lambda path: path.write_text("\n".join(map(json.dumps, ROWS)) + "\n"),
    "lines.jsonl": lambda path: path.write_text("\ufeff" + "\n\n".join(map(json.dumps, ROWS)), encoding="utf-8"),
    "columns.json": lambda path: path.write_text(json.dumps(COLUMNS)),
    "pandas.json": lambda path: path.write_text(
        json.dumps({name: dict(enumerate(values)) for name, values in COLUMNS.items()})
    ),
    "table.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "TABLE.PARQUET": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "stream.arrow": write_stream,
    "file.arrow": write_file,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows_and_leaves_no_copy(tmp_path, monkeypatch, form):
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(home))
    for name in ("a.svs", "b.svs"):
        (tmp_path / name).touch()
    FORMS[form](tmp_path / form)
    before = sorted(os.listdir(tmp_path))
    manifest = read_manifest(tmp_path / form)
    assert [slide.slide_id for slide in manifest.slides] == ["007", "8"]
    assert [(slide.mpp, slide.center) for slide in manifest.slides] == [(0.5, None), (None, "3")]
    assert sorted(os.listdir(tmp_path)) == before
    assert os.listdir(home) == []


def test_a_row_of_lines_and_rows_that_lack_a_column(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"slide_id": "a", "label": 1}')
    assert [dict(row.values) for row in read_table_file(tmp_path / "one.jsonl").rows] == [
        {"slide_id": "a", "label": "1"}
    ]
    (tmp_path / "two.jsonl").write_text('{"slide_id": "a"}\n{"label": 1}')
    table = read_table_file(tmp_path / "two.jsonl")
    assert table.headings == ("slide_id", "label")
    assert [(row["slide_id"], row["label"]) for row in table.rows] == [("a", ""), ("", "1")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"[1, 2]"),
        ("a.json", b'{"a": [1], "b": [1, 2]}'),
        ("a.json", b'[{"a": 1'),
        ("a.json", b"\xff\xfe"),
        ("a.parquet", b"PAR1"),
        ("a.arrow", b"nothing"),
        ("a.arrow", b""),
    ],
)
def test_what_is_no_table_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}"):
        read_table_file(tmp_path / name)
