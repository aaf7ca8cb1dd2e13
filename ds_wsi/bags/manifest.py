"""The cohort: one row per slide, checked as a whole before anything is trained."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ds_wsi.bags.problems import ManifestError
from ds_wsi.bags.slide_entry import SlideEntry, patient_problems
from ds_wsi.bags.tables.formats import joined, recognised
from ds_wsi.bags.tables.headings import heading_problems, missing_hint, unused
from ds_wsi.bags.tables.labels import label_problems, sorted_labels
from ds_wsi.bags.tables.names import is_slide_id, repeated_ids
from ds_wsi.bags.tables.paths import path_problem
from ds_wsi.bags.tables.read import Table, TableRow, read_table_file
from ds_wsi.bags.tables.values import (
    SPLITS,
    mpp_of,
    number_of,
    says_missing,
    spelled_several_ways,
    split_hint,
    split_of,
)
from ds_wsi.bags.target_columns import (
    ONE_CLASS,
    Target,
    TargetColumns,
    TargetsRead,
    patient_target_problems,
    read_targets,
)
from ds_wsi.runtime.files import atomic_path
from ds_wsi.runtime.log import logger
from ds_wsi.targets.choices import CLASSIFICATION

__all__ = [
    "SPLITS",
    "Manifest",
    "ManifestError",
    "SlideEntry",
    "parse_manifest",
    "patient_problems",
    "read_manifest",
    "write_manifest",
]

# What a command does with labels (and patients and splits): it needs every one; takes what is there; has no use.
LABELS = ("required", "optional", "unused")
SHOWN_COLUMNS = 12  # in the log
# What else can be done about labels, where classes are a model's, and where they are the cohort's own.
_MAP = ", or say which of the model's classes it is with --map_labels LABEL=CLASS"
_NAME = ", or name it among --classes"
_APART = ", or give --classes with all of them where they are different classes"


@dataclass(frozen=True)
class Manifest:
    """The cohort's slides, in the order of the file, and its class names in the order of the logits.

    Of another task than classification, which `columns` says, the classes are its grades or labels. `without_patient`
    are the ids of slides of which the file names no patient.
    """

    slides: tuple[SlideEntry, ...]
    classes: tuple[str, ...]
    source: str = "manifest"
    columns: TargetColumns = ONE_CLASS
    without_patient: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The kind of task that the slides' targets are of."""
        return self.columns.kind

    def in_split(self, split: str) -> tuple[SlideEntry, ...]:
        """The slides of one split, in the manifest's order."""
        return tuple(slide for slide in self.slides if slide.split == split)

    def label_name(self, slide: SlideEntry) -> str:
        """The name of a slide's class; "" where it has no label."""
        return "" if slide.label is None else self.classes[slide.label]

    def target_words(self, slide: SlideEntry) -> str:
        """What the table says of a slide's target: the class, or numbers and the stratum; "" where it says nothing."""
        if self.kind == CLASSIFICATION:
            return self.label_name(slide)
        words = ["" if value is None else f"{value:.17g}" for value in slide.target]
        return ";".join([*words, *([] if slide.stratum is None else [slide.stratum])])


def read_manifest(path: str | Path, classes: Sequence[str] | None = None) -> Manifest:
    """Read a cohort from CSV or TSV, from JSON, Parquet or Arrow, or from a dataset that `datasets` saved.

    Columns: slide_id, path (relative to the manifest's folder, or absolute), label, and optionally patient_id,
    split (train, validation or val, test), mpp (um/px), center. Tables of CLAM, TRIDENT, slideflow and STAMP are
    recognised by their headings (docs/tables.md).

    Args:
        path: the file, the folder of a dataset written by `datasets`' save_to_disk, or STAMP's two tables, divided by
            a comma.
        classes: class names in the order of the logits; by default the names of a ClassLabel, else the labels found,
            numbers by value.

    Raises:
        ManifestError: lists every problem of every row at once; missing files are among them.
    """
    manifest, problems = parse_manifest(path, classes)
    if problems:
        raise ManifestError(manifest.source, problems)
    return manifest


def parse_manifest(
    path: str | Path,
    classes: Sequence[str] | None = None,
    *,
    need_slides: bool = True,
    labels: str = "required",
    columns: TargetColumns = ONE_CLASS,
) -> tuple[Manifest, list[str]]:
    """Read a manifest, and return the rows' problems beside it, to be listed with those of the slides.

    Args:
        path, classes: see `read_manifest`.
        need_slides: whether the column `path`, and the files that it names, must be there.
        labels: "required": every slide has one, of at least two classes. "optional": there may be none; those that are
            there are checked. "unused": nothing is said of labels, patients and splits.
        columns: the columns that hold the targets; of another task than classification a cell may be empty.

    Raises:
        ManifestError: the table cannot be read, or lacks a column.
    """
    assert labels in LABELS
    source = f"manifest {path}"
    table, folder = _read(path)
    if not table.rows:
        raise ManifestError(source, ["must hold at least one slide, got none. HINT: write one row per slide."])
    table = _with_label(table, columns)
    _require_columns(table, source, columns, need_slides=need_slides, need_labels=labels == "required")
    used = {"slide_id", "mpp", *(["path"] if need_slides else [])}
    is_classes = columns.kind == CLASSIFICATION
    used |= {"patient_id", "split", *(["label"] if is_classes else [])} if labels != "unused" else set()
    problems = heading_problems(table.headings, used)
    _log_unused(table, source, columns)
    read = None if is_classes else read_targets(table, columns, classes)
    names = _classes(table, classes, source) if read is None else read.classes
    if labels != "unused" and read is None:
        given = bool(classes) or "label" in table.names
        problems += _label_problems(table, names, given=given, empty_ok=labels == "optional")
    uses_splits = labels != "unused"
    slides = tuple(_parse_row(row, table, folder, names, problems, need_slides, uses_splits) for row in table.rows)
    if read is not None:
        slides, columns = _with_targets(slides, columns, read), read.columns
        problems += read.problems if labels != "unused" else []
        problems += _patient_targets(slides, columns)
    problems += repeated_ids([slide.slide_id for slide in slides], [row.place for row in table.rows])
    if uses_splits:
        problems += _split_problems(slides)
        _tell_patients(slides, table, source)
    if labels == "required" and is_classes and len(names) < 2:
        problems.append(
            f"label must take at least two values, got {', '.join(names) or 'none'}. "
            "HINT: give the whole table, or name all classes with --classes."
        )
    unnamed = tuple(row["slide_id"] for row in table.rows if says_missing(row["patient_id"] or "NA"))
    return Manifest(slides, names, source, columns, unnamed), problems


def write_manifest(manifest: Manifest, path: str | Path) -> None:
    """Write a CSV that `read_manifest` reads, atomically; paths are absolute, classes are their names.

    The order of the classes is not in the file: give it to `read_manifest` where it is not the sorted one.
    """
    names = ("slide_id", "path", "label", "patient_id", "split", "mpp", "center")
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for slide in manifest.slides:
            values = vars(slide) | {"path": slide.path.absolute(), "label": manifest.label_name(slide)}
            writer.writerow(["" if values[name] is None else values[name] for name in names])


def _read(path: str | Path) -> tuple[Table, Path]:
    """The table in our headings, and the folder where its paths start; of two files, STAMP's, joined by patient."""
    parts = [Path(part.strip()) for part in str(path).split(",")]
    if len(parts) == 2 and not Path(path).exists() and all(part.exists() for part in parts):
        tables = [read_table_file(part) for part in parts]
        slides = [number for number, table in enumerate(tables) if {"PATIENT", "FILENAME"} <= set(table.headings)]
        if len(slides) != 1 or "PATIENT" not in tables[1 - slides[0]].headings:
            raise ManifestError(
                f"manifest {path}",
                [
                    "two tables must be STAMP's, one with PATIENT, one with PATIENT and FILENAME, got "
                    f"{' and '.join(', '.join(table.headings) for table in tables)}. HINT: give one table."
                ],
            )
        table, folder = joined(tables[1 - slides[0]], tables[slides[0]]), parts[slides[0]].parent
    else:
        table, folder = read_table_file(path), Path(path).parent
    table, words = recognised(table)
    if words is not None:
        logger.info("%s: read as %s", path, words)
    return table, folder


def _with_label(table: Table, columns: TargetColumns) -> Table:
    """The table whose column `label` is the one that holds the classes, of classification."""
    (name, *_) = columns.labels or ("label",)
    if columns.kind != CLASSIFICATION or name == "label" or name not in table.headings:
        return table
    return replace(
        table.with_column("label", [row[name] for row in table.rows]),
        names={**table.names, **({"label": table.names[name]} if name in table.names else {})},
    )


def _with_targets(slides: Sequence[SlideEntry], columns: TargetColumns, read: TargetsRead) -> tuple[SlideEntry, ...]:
    """The slides with their targets; a grade is their label too."""
    graded = columns.kind == "ordinal"
    return tuple(
        replace(
            slide, label=None if not graded or target[0] is None else int(target[0]), target=target, stratum=stratum
        )
        for slide, target, stratum in zip(slides, read.targets, read.strata, strict=True)
    )


def _patient_targets(slides: Sequence[SlideEntry], columns: TargetColumns) -> list[str]:
    """The problems of patients whose slides differ, see `patient_target_problems`."""
    by_patient: dict[str, dict[Target, list[str]]] = {}
    for slide in slides:
        by_patient.setdefault(slide.patient_id, {}).setdefault(slide.target, []).append(slide.slide_id)
    return patient_target_problems(columns, by_patient)


def _require_columns(
    table: Table, source: str, columns: TargetColumns, *, need_slides: bool, need_labels: bool
) -> None:
    required = ["slide_id", *(["path"] if need_slides else []), *(columns.used if need_labels else [])]
    missing = [name for name in required if name not in table.headings]
    if missing:
        hints = "; ".join(dict.fromkeys(missing_hint(name, table.headings) for name in missing))
        raise ManifestError(
            source,
            [
                f"must have the columns {', '.join(required)}; {', '.join(missing)} missing, got "
                f"{', '.join(table.headings)}. HINT: {hints}."
            ],
        )


def _log_unused(table: Table, source: str, columns: TargetColumns) -> None:
    others = [heading for heading in unused(table.headings) if heading not in columns.used]
    if others:
        more = f" and {len(others) - SHOWN_COLUMNS} more" if len(others) > SHOWN_COLUMNS else ""
        logger.info("%s: columns that are not used: %s%s", source, ", ".join(others[:SHOWN_COLUMNS]), more)


def _classes(table: Table, classes: Sequence[str] | None, source: str) -> tuple[str, ...]:
    """Those given, else a ClassLabel's names, else the labels found; a word for none is no class unless it is given."""
    if classes:
        twice = sorted({name for name in classes if list(classes).count(name) > 1})
        if twice:
            raise ManifestError(source, [f"classes must be named once, got {', '.join(twice)} again. HINT: --classes."])
        return tuple(classes)
    if "label" in table.names:
        return table.names["label"]
    return sorted_labels(row["label"] for row in table.rows if not says_missing(row["label"]))


def _label_problems(table: Table, classes: tuple[str, ...], *, given: bool, empty_ok: bool) -> list[str]:
    labels = [row["label"] for row in table.rows]
    values = [number_of(name) for name in classes]
    if not given and -1 in values and all(value is not None and value >= -1 for value in values):
        logger.warning(
            "label -1 is taken as a class, in %d rows. HINT: leave the label empty where there is none",
            labels.count("-1"),
        )
    places = [_place(row) for row in table.rows]
    if empty_ok:
        return label_problems(labels, places, classes, given=given, empty_ok=True, remedy=_MAP, apart="")
    return label_problems(labels, places, classes, given=given, empty_ok=False, remedy=_NAME, apart=_APART)


def _place(row: TableRow) -> str:
    return f"slide {row['slide_id']}, {row.place}"


def _parse_row(
    row: TableRow,
    table: Table,
    folder: Path,
    classes: tuple[str, ...],
    problems: list[str],
    need_slides: bool,
    uses_splits: bool,
) -> SlideEntry:
    slide_id, where = row["slide_id"], _place(row)
    if not is_slide_id(slide_id):
        hint = "letters, digits, blanks and ._-+=@() are; at most 200 bytes"
        shown = slide_id if len(slide_id) <= 60 else f"{slide_id[:57]}..."
        problems.append(
            f"slide_id must be non-empty and fit for a file name, got {shown!r} ({row.place}). HINT: {hint}."
        )
    problem = path_problem(row["path"], folder, where) if need_slides else None
    if problem is not None:
        problems.append(f"{problem}.")
    mpp, problem = mpp_of(row["mpp"], table.decimal_comma, where)
    if problem is not None:
        problems.append(problem)
    split, patient = split_of(row["split"]), row["patient_id"]
    if uses_splits:
        if row["split"] and split is None:
            hint = "leave it empty" if says_missing(row["split"]) else split_hint(row["split"])
            problems.append(f"split must be one of {', '.join(SPLITS)}, got {row['split']!r} ({where}). HINT: {hint}.")
            split = row["split"]
        if says_missing(patient):
            problems.append(
                f"patient_id must name the patient, got {patient!r} ({where}). "
                "HINT: leave it empty where it is unknown, the slide is then a patient of its own."
            )
            patient = ""
    label = classes.index(row["label"]) if row["label"] in classes else None
    return SlideEntry(slide_id, folder / row["path"], label, patient or slide_id, split, mpp, row["center"] or None)


def _split_problems(slides: Sequence[SlideEntry]) -> list[str]:
    problems = []
    assigned = [slide for slide in slides if slide.split]
    if assigned and len(assigned) < len(slides):
        left = [slide.slide_id for slide in slides if not slide.split]
        problems.append(
            f"split must be given for every slide or for none, got {len(left)} without ({', '.join(left[:5])}). "
            "HINT: fill the column in, or leave it out and splits are drawn by patient."
        )
    hint = "HINT: move them to one side, or leave the column split out and splits are drawn by patient."
    named = [slide for slide in assigned if slide.split in SPLITS]
    return problems + [f"{problem}. {hint}" for problem in patient_problems(named)]


def _tell_patients(slides: Sequence[SlideEntry], table: Table, source: str) -> None:
    """Tell what is taken of patients that are missing, or that are perhaps one."""
    if "patient_id" not in table.headings:
        return
    missing = sum(not row["patient_id"] for row in table.rows)
    if missing:
        logger.info("%s: %d slides without a patient_id are patients of their own", source, missing)
    alike = spelled_several_ways(row["patient_id"] for row in table.rows if row["patient_id"])
    if alike:
        shown = "; ".join(" and ".join(group) for group in alike[:5]) + ("; ..." if len(alike) > 5 else "")
        logger.warning("%s: patients that differ in spelling alone are taken as different ones: %s", source, shown)
