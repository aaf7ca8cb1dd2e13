"""Tables of other projects, recognised by their headings: CLAM, TRIDENT, slideflow, STAMP; in our words."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from ds_wsi.bags.problems import ManifestError
from ds_wsi.bags.tables.headings import COLUMNS
from ds_wsi.bags.tables.names import IMAGE_SUFFIXES, slide_names
from ds_wsi.bags.tables.read import Table, TableRow
from ds_wsi.bags.tables.values import split_of

SLIDEFLOW_SPLITS: Mapping[str, str] = {"eval": "test"}  # which its examples call the slides that are held out
_EXTRA_WORDS = ("", "Unnamed: 0", "index", "level_0")  # of pandas' index


def recognised(table: Table) -> tuple[Table, str | None]:
    """The table with our headings, and in words which project's it is; None where the headings are ours."""
    headings = set(table.headings)
    for is_it, translate in _FORMATS:
        if is_it(headings):
            return translate(table)
    return table, None


def joined(clini: Table, slides: Table) -> Table:
    """STAMP's two tables as one: one row per slide, with what the clini table has of its patient.

    Raises:
        ManifestError: a patient is in two rows of the clini table.
    """
    rows: dict[str, TableRow] = {}
    twice = [
        f"{row['PATIENT']!r} ({row.place})" for row in clini.rows if rows.setdefault(row["PATIENT"], row) is not row
    ]
    if twice:
        raise ManifestError(
            "STAMP's clini table",
            [f"PATIENT must be unique in it, got again {', '.join(twice[:5])}. HINT: keep one row per patient."],
        )
    shared = [heading for heading in clini.headings if heading in slides.headings and heading not in ("", "PATIENT")]
    if shared:
        raise ManifestError(
            "STAMP's tables",
            [f"columns other than PATIENT must be in one of them, got {', '.join(shared)} in both. HINT: rename one."],
        )
    nothing: Mapping[str, str] = {}
    both = (
        TableRow({**(rows[row["PATIENT"]].values if row["PATIENT"] in rows else nothing), **row.values}, row.place)
        for row in slides.rows
    )
    headings = (*slides.headings, *(heading for heading in clini.headings if heading not in slides.headings))
    return Table(headings, tuple(both), {**clini.names, **slides.names}, clini.decimal_comma or slides.decimal_comma)


def _is_clam(headings: set[str]) -> bool:
    return {"slide_id", "case_id"} <= headings and "patient_id" not in headings


def _clam(table: Table) -> tuple[Table, str]:
    return table.renamed({"case_id": "patient_id"}), "CLAM's table: case_id is the patient"


def _is_trident(headings: set[str]) -> bool:
    return "wsi" in headings and not headings & {"slide_id", "path"}


def _trident(table: Table) -> tuple[Table, str]:
    files = [row["wsi"] for row in table.rows]
    table = table.with_column("slide_id", slide_names(files)).renamed({"wsi": "path"})
    return table, "TRIDENT's list of slides: wsi is the slide's file, its name without the suffix the slide_id"


def _is_slideflow(headings: set[str]) -> bool:
    return "patient" in headings and "slide_id" not in headings and bool(headings & {"slide", "category", "dataset"})


def _slideflow(table: Table) -> tuple[Table, str]:
    words = ["patient is the patient_id"]
    slide = "slide" if "slide" in table.headings else "patient"
    words.append("slide is the slide_id" if slide == "slide" else "without a column slide each patient is one slide")
    table = table.with_column("slide_id", slide_names([row[slide] for row in table.rows]))
    renamed = {"patient": "patient_id"} if "patient_id" not in table.headings else {}
    if "category" in table.headings and "label" not in table.headings:
        renamed["category"] = "label"
        words.append("category is the label")
    if "dataset" in table.headings and "split" not in table.headings:
        parts = [SLIDEFLOW_SPLITS.get(row["dataset"].casefold(), row["dataset"]) for row in table.rows]
        if parts and all(split_of(part) for part in parts):
            table = _without(table.with_column("split", parts), "dataset")
            words.append("dataset is the split (eval is test)")
    return _without(table.renamed(renamed), "slide"), f"slideflow's annotations: {', '.join(words)}"


def _is_stamp(headings: set[str]) -> bool:
    return {"PATIENT", "FILENAME"} <= headings and not headings & {"slide_id", "patient_id"}


def _stamp(table: Table) -> tuple[Table, str]:
    words = ["PATIENT is the patient_id", "FILENAME without its suffix the slide_id"]
    files = [row["FILENAME"] for row in table.rows]
    table = table.with_column("slide_id", slide_names(files))
    if "path" not in table.headings and all(file.lower().endswith(IMAGE_SUFFIXES) for file in files):
        table = table.with_column("path", files)
        words.append("FILENAME the path")
    renamed = {"PATIENT": "patient_id"}
    known = {*COLUMNS, "PATIENT", "FILENAME", *_EXTRA_WORDS}
    others = [heading for heading in table.headings if heading not in known]
    label = next((heading for heading in others if heading.lower() == "label"), None)
    if "label" not in table.headings and (label or len(others) == 1):
        renamed[label or others[0]] = "label"
        words.append(f"{label or others[0]} is the label")
    return _without(table.renamed(renamed), "FILENAME"), f"STAMP's table: {', '.join(words)}"


def _without(table: Table, heading: str) -> Table:
    """The table without a column that has become another."""
    return replace(table, headings=tuple(name for name in table.headings if name != heading))


_FORMATS: tuple[tuple[Callable[[set[str]], bool], Callable[[Table], tuple[Table, str]]], ...] = (
    (_is_stamp, _stamp),
    (_is_clam, _clam),
    (_is_trident, _trident),
    (_is_slideflow, _slideflow),
)
