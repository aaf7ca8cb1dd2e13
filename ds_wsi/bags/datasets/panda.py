"""PANDA (Kaggle, prostate biopsies): `train.csv` and `train_images/*.tiff`.

Its TIFFs have no property that names the resolution: `Slide.mpp` takes it from the TIFF resolution tags, and the
cohort's check lists every slide whose tags say nothing plausible.
"""

import re
from pathlib import Path

from ds_wsi.bags.datasets.table import CohortBuilder, LabelRow, read_names, read_table, require_folder
from ds_wsi.bags.manifest import Manifest
from ds_wsi.bags.tables.names import slide_name
from ds_wsi.runtime.log import logger

GRADES = ("0", "1", "2", "3", "4", "5")
PROVIDERS = ("karolinska", "radboud")
GLEASON = re.compile(r"negative|[0345]\+[0345]")
COLUMNS = {name: (name,) for name in ("image_id", "data_provider", "isup_grade", "gleason_score")}
NAME_COLUMNS = ("image_id", "slide_id", "FILENAME")


def read_panda(
    root: str | Path, labels: str | Path | None = None, *, drop: str | Path | None = None, missing_ok: bool = False
) -> Manifest:
    """Read the PANDA cohort: six classes, the ISUP grades; each slide is its own patient, because the file names none.

    Args:
        root: holds `train_images`.
        labels: `train.csv`, by default the one in `root`.
        drop: slides to leave out (the noisy ones): a CSV with a column image_id, or one name per line.
        missing_ok: leave out, and count in the log, rows without an image instead of refusing them.

    Raises:
        ManifestError: lists every problem of every row at once.
    """
    root = require_folder(root, ("train_images",), "PANDA")
    rows = read_table(labels or root / "train.csv", COLUMNS, tuple(COLUMNS))
    builder = CohortBuilder(f"PANDA in {root}", GRADES)
    dropped = _dropped(builder, rows, drop)
    absent = 0
    for row in rows:
        slide_id = row["image_id"]
        path = root / "train_images" / f"{slide_id}.tiff"
        if slide_id in dropped:
            continue
        if missing_ok and not path.is_file():
            absent += 1
            continue
        _check(builder, row)
        builder.add(row, slide_id, [path], row["isup_grade"], center=row["data_provider"])
    if dropped or absent:
        logger.info("PANDA: %d slides dropped by %s, %d without an image left out", len(dropped), drop, absent)
    return builder.finish()


def _dropped(builder: CohortBuilder, rows: list[LabelRow], drop: str | Path | None) -> set[str]:
    known = {row["image_id"] for row in rows}
    named = read_names(drop, NAME_COLUMNS) if drop else []
    builder.problems += [
        f"slide to drop must be in train.csv, got {slide_name(name)!r} ({place}). HINT: is it the list of this dataset?"
        for name, place in named
        if name not in known
    ]
    return {name for name, _ in named} & known


def _check(builder: CohortBuilder, row: LabelRow) -> None:
    hint = "take the row from Kaggle's train.csv"
    builder.require(row, "isup_grade", row["isup_grade"], GRADES, hint)
    builder.require(row, "data_provider", row["data_provider"], PROVIDERS, hint)
    if not GLEASON.fullmatch(row["gleason_score"]):
        builder.problems.append(
            f"gleason_score must be negative or two patterns such as 3+4, got {row['gleason_score']!r} ({row.place}). "
            f"HINT: {hint}."
        )
