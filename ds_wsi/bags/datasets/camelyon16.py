"""CAMELYON16: `reference.csv`, `training/{normal,tumor}/*.tif`, `testing/images/*.tif`."""

import re
from pathlib import Path

from ds_wsi.bags.datasets.corrections import REMOVE, as_target, classes_of, read_corrections, unknown_slides
from ds_wsi.bags.datasets.table import CohortBuilder, LabelRow, read_table, require_folder
from ds_wsi.bags.manifest import Manifest
from ds_wsi.bags.tables.names import slide_name
from ds_wsi.runtime.log import logger

COLUMNS = {name: (name,) for name in ("image", "type", "class", "center")}
NAME = re.compile(r"(normal|tumor|test)_\d{3}\.tif")
CLASSES_OF_TYPE = {"normal": ("negative",), "tumor": ("itc", "micro", "macro")}
CENTERS = ("0", "1")


def read_camelyon16(
    root: str | Path,
    labels: str | Path | None = None,
    *,
    target: str = "tumor",
    corrections: str | Path | None = None,
) -> Manifest:
    """Read CAMELYON16 with its official split: `test_*` is the test split, everything else trains.

    A slide is a patient of its own, as the challenge has it.

    Args:
        root: holds `training` and `testing`, or `images` with all of them.
        labels: `reference.csv`, by default the one in `root`.
        target: "tumor" (normal, tumor) or "stage" (negative, itc, micro, macro).
        corrections: labels that override, see `corrections`; `remove` leaves a slide out.

    Raises:
        ManifestError: lists every problem of every row at once.
    """
    root = require_folder(root, ("training", "testing", "images"), "CAMELYON16")
    rows = read_table(labels or root / "reference.csv", COLUMNS, tuple(COLUMNS))
    builder = CohortBuilder(f"CAMELYON16 in {root}", classes_of(target))
    corrected = read_corrections(builder, corrections, target)
    changed = removed = 0
    for row in rows:
        slide_id = slide_name(row["image"])
        label = as_target(row["type" if target == "tumor" else "class"], target)
        if _check(builder, row) and slide_id in corrected:
            given, label = label, corrected[slide_id][0]
            changed, removed = changed + (label not in (given, REMOVE)), removed + (label == REMOVE)
        if label == REMOVE:
            continue
        split = "test" if row["image"].startswith("test_") else "train"
        builder.add(row, slide_id, _places(root, row["image"]), label, split=split, center=row["center"])
    unknown_slides(builder, corrected, {slide_name(row["image"]) for row in rows})
    if corrections:
        logger.info("CAMELYON16: %s changes %d labels and removes %d slides", corrections, changed, removed)
    return builder.finish()


def _check(builder: CohortBuilder, row: LabelRow) -> bool:
    """Whether a row is as the challenge writes it."""
    hint = "take the row from the challenge's reference.csv"
    before = len(builder.problems)
    if not NAME.fullmatch(row["image"]):
        builder.problems.append(
            f"image must be normal_, tumor_ or test_ with three digits and .tif, got {row['image']!r} ({row.place}). "
            f"HINT: {hint}."
        )
    builder.require(row, "center", row["center"], CENTERS, hint)
    if builder.require(row, "type", row["type"], CLASSES_OF_TYPE, hint):
        builder.require(row, f"class of type {row['type']}", row["class"], CLASSES_OF_TYPE[row["type"]], hint)
    return len(builder.problems) == before


def _places(root: Path, image: str) -> list[Path]:
    kind = image.split("_")[0]
    folder = root / "testing" / "images" if kind == "test" else root / "training" / kind
    return [folder / image, root / "images" / image]
