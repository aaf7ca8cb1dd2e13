"""The cohort: one row a slide, checked as a whole before anything is trained."""

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_wsi.bags.delimited import read_delimited
from ds_wsi.bags.records import SUFFIXES, read_records
from ds_wsi.runtime.files import atomic_path

SPLITS = ("train", "validation", "test")
REQUIRED = ("slide_id", "path", "label")
SPLIT_ALIASES = {"val": "validation", "valid": "validation"}
# A slide_id names files: coordinates, heat maps.
SLIDE_ID_RULE = re.compile(r"[\w.()+=@ -]+")


class ManifestError(ValueError):
    """Everything that is wrong with a cohort, in one message.

    Attributes:
        problems: one line each.
        slides: those that could be read from a label file all the same, whose files can be checked too.
    """

    def __init__(self, source: str, problems: Sequence[str], slides: "Sequence[SlideEntry]" = ()) -> None:
        self.source, self.problems, self.slides = source, tuple(problems), tuple(slides)
        lines = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(self.problems, 1))
        super().__init__(f"{source} has {len(self.problems)} problem(s):\n{lines}")


@dataclass(frozen=True)
class SlideEntry:
    """One slide of the cohort.

    Attributes:
        slide_id: unique; names the slide in every output.
        path: of the slide file; in a cohort of features it need not be there.
        label: index into the manifest's classes.
        patient_id: the slide's own id where the manifest has no patients.
        split: train, validation, test, or None where not yet assigned.
        mpp: overrides the file's own, um/px.
        center: where the slide was scanned, if known.
    """

    slide_id: str
    path: Path
    label: int
    patient_id: str
    split: str | None = None
    mpp: float | None = None
    center: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The cohort's slides, in the order of the file, and its class names in the order of the logits."""

    slides: tuple[SlideEntry, ...]
    classes: tuple[str, ...]
    source: str = "manifest"

    def in_split(self, split: str) -> tuple[SlideEntry, ...]:
        """The slides of one split, in the manifest's order."""
        return tuple(slide for slide in self.slides if slide.split == split)


def read_manifest(path: str | Path, classes: Sequence[str] | None = None) -> Manifest:
    """Read a cohort from CSV or TSV, or from anything that `datasets` loads (JSON, Parquet, a saved dataset).

    Columns: slide_id, path (relative to the manifest's folder, or absolute), label, and optionally patient_id,
    split (train, validation or val, test), mpp (um/px), center.

    Args:
        path: the file, or the folder of a dataset written by `datasets`' save_to_disk.
        classes: class names in the order of the logits; by default the labels found, numbers by value.

    Raises:
        ManifestError: lists every problem of every row at once; missing files are among them.
    """
    manifest, problems = parse_manifest(path, classes)
    if problems:
        raise ManifestError(manifest.source, problems)
    return manifest


def parse_manifest(
    path: str | Path, classes: Sequence[str] | None = None, *, need_slides: bool = True
) -> tuple[Manifest, list[str]]:
    """As `read_manifest`, but returns the rows' problems beside the manifest, to be listed with those of the slides.

    Without `need_slides` neither the column `path` nor the files that it names need be there.
    """
    path = Path(path)
    if not path.exists():
        raise ManifestError(f"manifest {path}", ["file must exist, got none. HINT: check --manifest."])
    rows = _read_rows(path)
    if not rows:
        raise ManifestError(f"manifest {path}", ["must hold at least one slide, got none"])
    required = [name for name in REQUIRED if need_slides or name != "path"]
    missing = [name for name in required if name not in rows[0]]
    if missing:
        raise ManifestError(
            f"manifest {path}",
            [f"must have the columns {', '.join(required)}; {', '.join(missing)} missing, got {', '.join(rows[0])}"],
        )
    names = tuple(classes) if classes else sorted_labels(row["label"] for row in rows)
    problems: list[str] = []
    slides = tuple(
        _parse_row(row, number, path.parent, names, problems, need_slides) for number, row in enumerate(rows, 2)
    )
    problems += _cohort_problems(slides, names)
    return Manifest(slides, names, f"manifest {path}"), problems


def write_manifest(manifest: Manifest, path: str | Path) -> None:
    """Write a CSV that `read_manifest` reads, atomically; paths are absolute, classes are their names.

    The order of the classes is not in the file: give it to `read_manifest` where it is not the sorted one.
    """
    names = ("slide_id", "path", "label", "patient_id", "split", "mpp", "center")
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for slide in manifest.slides:
            values = vars(slide) | {"path": slide.path.absolute(), "label": manifest.classes[slide.label]}
            writer.writerow(["" if values[name] is None else values[name] for name in names])


def _read_rows(path: Path) -> list[dict[str, str]]:
    if path.suffix.lower() in (".csv", ".tsv"):
        # Not through `datasets`: its type inference turns the slide_id "007" into the number 7.
        return [row.values for row in read_delimited(path)[1]]
    table: Any
    if path.is_dir():
        import datasets  # here, for it takes a second that a file does not need

        table = datasets.load_from_disk(str(path))
    elif path.suffix.lower() in SUFFIXES:
        table = read_records(path)  # not through `datasets`, which keeps a copy below the user's home
    else:
        raise ManifestError(
            f"manifest {path}",
            [f"must be .csv, .tsv, {', '.join(SUFFIXES)} or a dataset's folder, got {path.suffix!r}"],
        )
    return [{key: "" if value is None else str(value).strip() for key, value in row.items()} for row in table]


def sorted_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """The labels that occur, each once, empty ones left out: sorted, by value where all are whole numbers."""
    found = {label for label in labels if label}
    numeric = all(re.fullmatch(r"-?\d+", label) for label in found)
    return tuple(sorted(found, key=int) if numeric else sorted(found))


def _parse_row(
    row: dict[str, str], number: int, folder: Path, classes: tuple[str, ...], problems: list[str], need_slides: bool
) -> SlideEntry:
    slide_id, where = row["slide_id"], f"row {number}"
    if not SLIDE_ID_RULE.fullmatch(slide_id):
        problems.append(f"slide_id must be non-empty and fit for a file name, got {slide_id!r} ({where})")
    place = f"slide {slide_id}, {where}"
    if row["label"] not in classes:
        problems.append(f"label must be one of {', '.join(classes)}, got {row['label']!r} ({place})")
    path = folder / row.get("path", "")
    if need_slides and (not row["path"] or not path.is_file()):
        problems.append(f"path must be a file, got {row['path']!r}, which is none under {folder} ({place})")
    split = row.get("split") or None
    split = SPLIT_ALIASES.get(split, split) if split else None
    if split not in (*SPLITS, None):
        problems.append(f"split must be one of {', '.join(SPLITS)}, got {split!r} ({place})")
    label = classes.index(row["label"]) if row["label"] in classes else -1
    mpp = _parse_mpp(row.get("mpp", ""), place, problems)
    return SlideEntry(slide_id, path, label, row.get("patient_id") or slide_id, split, mpp, row.get("center") or None)


def _parse_mpp(text: str, place: str, problems: list[str]) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        problems.append(f"mpp must be a number of um/px, got {text!r} ({place})")
        return None


def _cohort_problems(slides: Sequence[SlideEntry], classes: Sequence[str]) -> list[str]:
    problems = []
    if len(classes) < 2:
        problems.append(f"label must take at least two values, got {', '.join(classes) or 'none'}")
    seen: dict[str, int] = {}
    for number, slide in enumerate(slides, 2):
        if slide.slide_id in seen:
            problems.append(
                f"slide_id must be unique, got {slide.slide_id!r} in rows {seen[slide.slide_id]} and {number}"
            )
        seen.setdefault(slide.slide_id, number)
    assigned = [slide for slide in slides if slide.split]
    if assigned and len(assigned) < len(slides):
        left = [slide.slide_id for slide in slides if not slide.split]
        problems.append(
            f"split must be given for every slide or for none, got {len(left)} without ({', '.join(left[:5])})"
        )
    return problems + patient_problems(assigned)


def patient_problems(slides: Sequence[SlideEntry]) -> list[str]:
    """Name each patient whose slides are in more than one split."""
    places: dict[str, dict[str, list[str]]] = {}
    for slide in slides:
        places.setdefault(slide.patient_id, {}).setdefault(str(slide.split), []).append(slide.slide_id)
    return [
        f"patient {patient} must be in one split, got "
        + " and ".join(f"{split} ({', '.join(ids)})" for split, ids in splits.items())
        for patient, splits in places.items()
        if len(splits) > 1
    ]
