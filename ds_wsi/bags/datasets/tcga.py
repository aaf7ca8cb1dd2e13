"""TCGA (Lung: LUAD and LUSC; PRAD; any other): slides by barcode, labels from a table or from the folders' names.

A barcode such as TCGA-83-5908-01Z-00-DX1.381c8f82-... begins with the patient's: its first 12 characters.
"""

import re
from collections import defaultdict
from pathlib import Path

from ds_wsi.bags.datasets.table import CohortBuilder, LabelRow, classes_in, has_column, read_table
from ds_wsi.bags.manifest import Manifest, ManifestError
from ds_wsi.bags.tables.names import IMAGE_SUFFIXES, slide_name
from ds_wsi.runtime.log import logger

BARCODE = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(-.+)?")
PATIENT_CHARACTERS = 12
COLUMNS = {
    "slide": ("slide", "slide_id", "File Name", "filename", "file_name"),
    "label": ("label", "subtype", "Project ID", "project_id", "OncoTreeCode"),
    "patient": ("patient", "case_id", "Case ID", "patient_id"),
    "center": ("site", "center"),
    "file": ("File ID",),
    "type": ("Data Type",),
}
SLIDE_IMAGE = "Slide Image"  # what a GDC sheet calls them


def read_tcga(
    root: str | Path,
    labels: str | Path | None = None,
    *,
    label_column: str | None = None,
    one_per_patient: bool = False,
) -> Manifest:
    """Read a TCGA cohort; classes are the labels found, sorted, numbers by value.

    Args:
        root: slides lie anywhere below it, in the GDC client's folders or in others.
        labels: a CSV or TSV with a slide and a label column, or the GDC's sample sheet, whose Project ID is the label;
            or with a patient and a label column, which is then that of all the patient's slides (PRAD's ISUP grades);
            by default each folder in `root` is a class (LUAD, LUSC).
        label_column: heading of the label column, where it is none of the usual ones (an ISUP grade, say).
        one_per_patient: keep each patient's first slide by name; how many are left out is logged.

    Raises:
        ManifestError: lists every problem of every row at once.
    """
    root = Path(root)
    places = _index(root)
    rows = _table(labels, label_column, places) if labels else _folders(root, places)
    if one_per_patient:
        kept = {row["slide"][:PATIENT_CHARACTERS]: row for row in sorted(rows, key=lambda row: row["slide"])[::-1]}
        logger.info("TCGA: %d further slides of a patient left out", len(rows) - len(kept))
        rows = [row for row in rows if kept[row["slide"][:PATIENT_CHARACTERS]] is row]
    builder = CohortBuilder(f"TCGA in {root}", classes_in(rows))
    builder.check_spellings(rows)
    for row in rows:
        slide_id = slide_name(row["slide"])
        _check(builder, row)
        candidates = places[slide_id.lower()]
        if row["file"]:  # the GDC client keeps each file in a folder of its id
            candidates = [path for path in candidates if path.parent.name == row["file"]] or candidates
        if len(candidates) > 1:
            builder.problems.append(
                f"slide must be one file, got {', '.join(map(str, candidates))} (slide {slide_id}, {row.place}). "
                "HINT: delete the copies."
            )
            continue
        patient = slide_id[:PATIENT_CHARACTERS]
        builder.add(row, slide_id, candidates, row["label"], patient_id=patient, center=row["center"] or None)
    return builder.finish()


def _index(root: Path) -> dict[str, list[Path]]:
    """Slide name in lower case (tables differ in the case of the random part) -> its files below `root`."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            found[slide_name(path.name).lower()].append(path)
    if not found:
        raise ManifestError(
            f"TCGA in {root}",
            [
                f"folder must hold slides ({', '.join(IMAGE_SUFFIXES)}), got none ({root}). "
                "HINT: give the folder of the downloads."
            ],
        )
    return found


def _table(labels: str | Path, label_column: str | None, places: dict[str, list[Path]]) -> list[LabelRow]:
    columns = COLUMNS | ({"label": (label_column,)} if label_column else {})
    if not has_column(labels, columns["slide"]) and has_column(labels, columns["patient"]):
        return _by_patient(read_table(labels, columns, ("patient", "label")), places)
    rows = read_table(labels, columns, ("slide", "label"))
    slides = [row for row in rows if row["type"] in ("", SLIDE_IMAGE)]
    if len(slides) < len(rows):
        logger.info("TCGA: %d rows of %s are no slides and are skipped", len(rows) - len(slides), labels)
    return slides


def _by_patient(rows: list[LabelRow], places: dict[str, list[Path]]) -> list[LabelRow]:
    """One row per slide: a patient's label is that of all its slides. A patient without one keeps its row."""
    slides: dict[str, list[str]] = defaultdict(list)
    for paths in places.values():
        slides[paths[0].name[:PATIENT_CHARACTERS].upper()].append(paths[0].name)
    return [
        LabelRow({**row.values, "slide": name}, row.place)
        for row in rows
        for name in slides[row["patient"].upper()] or [row["patient"]]
    ]


def _folders(root: Path, places: dict[str, list[Path]]) -> list[LabelRow]:
    files = [path.relative_to(root) for paths in places.values() for path in paths]
    return [
        LabelRow({"slide": path.name, "label": path.parts[0] if len(path.parts) > 1 else ""}, f"folder {path.parent}")
        for path in sorted(files)
    ]


def _check(builder: CohortBuilder, row: LabelRow) -> None:
    slide_id = slide_name(row["slide"])
    builder.check_label(row, slide_id)
    if not BARCODE.fullmatch(slide_id):
        builder.problems.append(
            f"slide must be named by its barcode, TCGA-XX-XXXX-..., got {slide_id!r} ({row.place}). "
            "HINT: a cohort of other slides takes a manifest of your own."
        )
    # A sample sheet repeats the case of each of a file's samples.
    patient = row["patient"].split(",")[0].strip()
    if patient and patient != slide_id[:PATIENT_CHARACTERS]:
        builder.problems.append(
            f"patient must be the barcode's first {PATIENT_CHARACTERS} characters, {slide_id[:PATIENT_CHARACTERS]}, "
            f"got {patient!r} ({row.place}). HINT: correct the row."
        )
