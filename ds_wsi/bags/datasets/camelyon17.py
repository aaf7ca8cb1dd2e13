"""CAMELYON17: `stage_labels.csv` and five slides per patient from five centers.

The file's `.zip` rows are of patients with their stage (pN0 and so on), its `.tif` rows of slides. The test patients
(100 and above) are not in it: their slides join where corrections name them.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from ds_wsi.bags.datasets.corrections import REMOVE, STAGES, as_target, classes_of, read_corrections, unknown_slides
from ds_wsi.bags.datasets.table import CohortBuilder, LabelRow, read_table, require_folder
from ds_wsi.bags.manifest import Manifest
from ds_wsi.bags.tables.names import slide_name
from ds_wsi.runtime.log import logger

COLUMNS = {"name": ("patient",), "stage": ("stage",)}
SLIDE = re.compile(r"(patient_(\d{3}))_node_[0-4]")
PATIENT = re.compile(r"patient_\d{3}\.zip")
PATIENT_STAGES = ("pN0", "pN0(i+)", "pN1mi", "pN1", "pN2")
TRAINING_PATIENTS, PATIENTS_A_CENTER = 100, 20
CENTERS = ("0", "1", "2", "3", "4")
FOLDERS = ("training", "images", "testing", *(f"center_{center}" for center in CENTERS))


def read_camelyon17(
    root: str | Path,
    labels: str | Path | None = None,
    *,
    target: str = "stage",
    corrections: str | Path | None = None,
    test_centers: Sequence[str] = (),
) -> Manifest:
    """Read CAMELYON17, five slides per patient.

    The split is the official one where corrections bring in test patients; by `test_centers` where given; else there
    is none yet, and one is drawn by patient.

    Args:
        root: holds `training/center_k`, `center_k`, or `images` with all slides; patients may have folders in it.
        labels: `stage_labels.csv`, by default the one in `root`.
        target: "stage" (negative, itc, micro, macro) or "tumor" (normal, tumor; isolated tumour cells are tumour).
        corrections: labels that override, see `corrections`; `remove` leaves a slide out.
        test_centers: the centers whose slides are the test split, "0" to "4".

    Raises:
        ManifestError: lists every problem of every row at once.
    """
    root = require_folder(root, FOLDERS, "CAMELYON17")
    rows = read_table(labels or root / "stage_labels.csv", COLUMNS, tuple(COLUMNS))
    builder = CohortBuilder(f"CAMELYON17 in {root}", classes_of(target))
    builder.problems += [
        f"test center must be one of {', '.join(CENTERS)}, got {center!r} (test_centers). HINT: give its digit."
        for center in test_centers
        if center not in CENTERS
    ]
    corrected = read_corrections(builder, corrections, target)
    official = [row for row in rows if not _is_patient(builder, row)]
    slides = [(slide_name(row["name"]), as_target(_stage(builder, row), target), row) for row in official]
    known = {name for name, *_ in slides}
    extra = [
        (name, label, row)
        for name, (label, row) in corrected.items()
        if name not in known and _patient_number(name) >= TRAINING_PATIENTS
    ]
    unknown_slides(builder, corrected, known | {name for name, *_ in extra})
    for name, own, row in slides + extra:
        label = corrected[name][0] if name in corrected else own
        if label == REMOVE:
            continue
        center = _center(name)
        split = None
        if test_centers:
            split = "test" if center in test_centers else "train"
        elif extra:
            split = "test" if _patient_number(name) >= TRAINING_PATIENTS else "train"
        match = SLIDE.fullmatch(name)
        patient = match[1] if match else name
        places = _places(root, name, patient, center)
        builder.add(row, name, places, label, patient_id=patient, split=split, center=center)
    logger.info("CAMELYON17: %d patient rows skipped, %d slide rows", len(rows) - len(official), len(official))
    return builder.finish()


def _is_patient(builder: CohortBuilder, row: LabelRow) -> bool:
    if not PATIENT.fullmatch(row["name"]):
        return False
    builder.require(row, "patient's stage", row["stage"], PATIENT_STAGES, "take the row from stage_labels.csv")
    return True


def _stage(builder: CohortBuilder, row: LabelRow) -> str:
    hint = "take the row from the challenge's stage_labels.csv"
    if not row["name"].endswith(".tif") or not SLIDE.fullmatch(slide_name(row["name"])):
        builder.problems.append(
            f"patient must be patient_NNN.zip or patient_NNN_node_N.tif, got {row['name']!r} ({row.place}). "
            f"HINT: {hint}."
        )
    builder.require(row, "stage", row["stage"], STAGES, hint)
    return row["stage"]


def _patient_number(name: str) -> int:
    match = SLIDE.fullmatch(name)
    return int(match[2]) if match else -1


def _center(name: str) -> str | None:
    """Center k has patients 20k to 20k + 19; the test patients' centers are not published in the names."""
    number = _patient_number(name)
    return str(number // PATIENTS_A_CENTER) if 0 <= number < TRAINING_PATIENTS else None


def _places(root: Path, name: str, patient: str, center: str | None) -> list[Path]:
    folders = [root / "images", root / "training", root / "testing", root / "testing" / "patients"]
    if center is not None:
        folders = [root / "training" / f"center_{center}", root / f"center_{center}", *folders[:2]]
    return [place / f"{name}.tif" for folder in folders for place in (folder, folder / patient)]
