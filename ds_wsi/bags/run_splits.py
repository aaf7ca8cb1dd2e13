"""splits.csv in a run's folder: on which slides it trained, validated and tested, where it drew the splits too."""

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ds_wsi.bags.delimited import read_delimited
from ds_wsi.bags.manifest import SPLITS, Manifest, SlideEntry
from ds_wsi.bags.slide_entry import slides_of_rows
from ds_wsi.runtime.files import atomic_path
from ds_wsi.runtime.log import logger

FILE_NAME = "splits.csv"
COLUMNS = ("slide_id", "patient_id", "split", "label")
SHOWN = 5


@dataclass(frozen=True)
class RunSplits:
    """What a run's splits.csv says.

    Args:
        split_of: slide id -> its split.
        patients: split -> the patients with slides in it.
    """

    split_of: dict[str, str]
    patients: dict[str, frozenset[str]]


def write_splits(manifest: Manifest, folder: Path) -> None:
    """Write splits.csv atomically, a row per slide in the manifest's order; a patient's together."""
    with atomic_path(folder / FILE_NAME) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for slide in slides_of_rows(manifest.slides):
            writer.writerow([slide.slide_id, slide.patient_id, slide.split, manifest.label_name(slide)])


def read_splits(folder: Path) -> RunSplits | None:
    """The splits of a run's folder; None where an earlier version, which wrote none, made the run.

    Raises:
        ValueError: the file is none of `write_splits`.
    """
    path = folder / FILE_NAME
    if not os.path.lexists(path):
        return None
    columns, rows = read_delimited(path)
    if tuple(columns) != COLUMNS:
        raise ValueError(f"{path} must have the columns {', '.join(COLUMNS)}, got {', '.join(columns)}")
    values = [row.values for row in rows]
    split_of = {row["slide_id"]: row["split"] for row in values}
    patients = {split: frozenset(row["patient_id"] for row in values if row["split"] == split) for split in SPLITS}
    return RunSplits(split_of, patients)


def with_run_splits(manifest: Manifest, splits: RunSplits | None) -> Manifest:
    """A manifest without splits with those of the run; slides that the run did not have stay without one."""
    if splits is None or any(slide.split for slide in manifest.slides):
        return manifest
    slides = tuple(replace(slide, split=splits.split_of.get(slide.slide_id)) for slide in manifest.slides)
    n_split = sum(slide.split is not None for slide in slides)
    logger.info("splits are the run's, of its %s: %d of %d slides have one", FILE_NAME, n_split, len(slides))
    return replace(manifest, slides=slides)


def warn_of_overlap(slides: Sequence[SlideEntry], splits: RunSplits | None) -> None:
    """Count the evaluated slides, and the other slides of their patients, that the run was trained or chosen on."""
    if splits is None:
        return
    of_run = {split: [slide for slide in slides if splits.split_of.get(slide.slide_id) == split] for split in SPLITS}
    if of_run["train"]:
        logger.warning(
            "%d of %d evaluated slides are among the run's training slides (%s): the metrics are too good",
            *(len(of_run["train"]), len(slides), _some(slide.slide_id for slide in of_run["train"])),
        )
    if of_run["validation"]:
        logger.warning(
            "%d of %d evaluated slides are among the run's validation slides, on which its epoch was chosen (%s)",
            *(len(of_run["validation"]), len(slides), _some(slide.slide_id for slide in of_run["validation"])),
        )
    others = [slide for slide in slides if splits.split_of.get(slide.slide_id) not in ("train", "validation")]
    patients = sorted({slide.patient_id for slide in others} & splits.patients["train"])
    if patients:
        logger.warning(
            "%d evaluated patients have other slides in the run's training (%s)", len(patients), _some(patients)
        )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:SHOWN]) + (", ..." if len(listed) > SHOWN else "")
