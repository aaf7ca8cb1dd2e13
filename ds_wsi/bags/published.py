"""Published splits, given by the user as files: CLAM's and PANTHER's formats, one split or k folds.

CLAM writes `splits_k.csv` with the columns train, val, test, each a list of slides of its own length; or, as
`splits_k_bool.csv`, one slide per row with True in one of them. PANTHER writes a folder with train.csv, val.csv and
test.csv, one slide per row.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ds_wsi.bags.datasets.table import read_table
from ds_wsi.bags.delimited import read_delimited
from ds_wsi.bags.manifest import Manifest, ManifestError, patient_problems
from ds_wsi.bags.splits import at_level
from ds_wsi.bags.tables.names import path_name, slide_name
from ds_wsi.bags.tables.values import number_of, split_of
from ds_wsi.runtime.log import logger

CLAM_COLUMNS = ("train", "val", "test")
PANTHER_COLUMNS = {
    "slide": ("slide_id", "FILENAME", "image_id"),
    "patient": ("PATIENT", "case_id"),
    "label": ("isup_grade",),
}
# In CLAM's tables: a column that is shorter than the longest, as pandas writes it; another split of a boolean one.
NOT_THERE = ("", "nan", "false")
FOLD = re.compile(r"(?:splits_|.*k=|fold_?)(\d+)(?:\.csv)?")


@dataclass(frozen=True)
class PublishedRow:
    """A slide's place in a published split; patient and label where the file gives them, else empty."""

    slide: str
    split: str
    place: str
    patient: str = ""
    label: str = ""


def find_folds(folder: str | Path) -> tuple[Path, ...]:
    """The files (CLAM's splits_k.csv) or folders (PANTHER's ..._k=K) of k folds, by number.

    Raises:
        ManifestError: none, or a number is missing or there twice.
    """
    folder = Path(folder)
    found: dict[int, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = FOLD.fullmatch(path.name)
        if match and (path.is_dir() or path.suffix == ".csv"):
            found[int(match[1])].append(path)
    numbers = sorted(found)
    if not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))) or numbers[0] > 1:
        raise ManifestError(
            f"folds in {folder}",
            [
                f"folds must be numbered without a gap, got {', '.join(map(str, numbers)) or 'none'} ({folder}). "
                "HINT: give the folder of splits_0.csv, splits_1.csv, ... or of NAME_k=0, NAME_k=1, ..."
            ],
        )
    twice = [str(path) for paths in found.values() if len(paths) > 1 for path in paths]
    if twice:
        raise ManifestError(
            f"folds in {folder}",
            [f"a fold must be there once, got {', '.join(twice)}. HINT: keep one cohort per folder."],
        )
    return tuple(found[number][0] for number in numbers)


def apply_split(
    manifest: Manifest,
    split: str | Path,
    *,
    level: str = "patient",
    keep_listed: bool = False,
    test: str = "test",
) -> Manifest:
    """The cohort with a published split.

    Args:
        manifest: the slides; its own splits are put aside.
        split: CLAM's CSV or PANTHER's folder.
        level: "patient" refuses a split that has a patient on two sides; "slide" takes it as the paper did and warns.
        keep_listed: drop, and count in the log, slides that the split does not name, instead of refusing them.
        test: name of PANTHER's test file without .csv, of which there can be several.

    Raises:
        ManifestError: lists every problem at once.
    """
    known = {slide.slide_id: slide for slide in manifest.slides}
    rows = _with_ids(list(_read(Path(split), test)), tuple(known), split)
    problems = _row_problems(rows, manifest)
    listed = {row.slide: row for row in rows}
    left = [name for name in known if name not in listed]
    if left and not keep_listed:
        problems += [
            f"slide must be in the split, got {name!r} in none of it ({split}). HINT: --keep_listed drops such slides."
            for name in left
        ]
    elif left:
        logger.info("%s: %d slides that it does not name are left out", split, len(left))
    slides = [
        replace(slide, split=listed[name].split, patient_id=listed[name].patient or slide.patient_id)
        for name, slide in known.items()
        if name in listed
    ]
    out = replace(
        at_level(replace(manifest, slides=tuple(slides)), level), source=f"{manifest.source} split by {split}"
    )
    problems += [
        f"{problem} ({split}). HINT: --split_level slide takes the split as it was published, leakage and all."
        for problem in patient_problems(out.slides)
    ]
    if problems:
        raise ManifestError(out.source, problems)
    return out


def _with_ids(rows: Sequence[PublishedRow], known: Sequence[str], split: str | Path) -> list[PublishedRow]:
    """The rows with the cohort's names for their slides, which the files give as names, paths, or numbers.

    pandas writes a column of whole numbers that is shorter than the longest as floats: 7.0 is slide 7. A number is
    taken for the one slide of the cohort whose name has its value.
    """
    named = set(known)
    by_value: dict[float, list[str]] = defaultdict(list)
    for slide in known:
        value = number_of(slide)
        if value is not None:
            by_value[value].append(slide)
    found, as_numbers = [], []
    for row in rows:
        slide = next((name for name in (slide_name(row.slide), path_name(row.slide)) if name in named), "")
        value = None if slide else number_of(row.slide, decimal_comma=True)
        if value is not None and len(by_value[value]) == 1:
            slide = by_value[value][0]
            as_numbers.append(f"{row.slide} is {slide}")
        found.append(replace(row, slide=slide or slide_name(row.slide)))
    if as_numbers:
        logger.info("%s: %d slides are read as numbers (%s ...)", split, len(as_numbers), as_numbers[0])
    return found


def _row_problems(rows: Sequence[PublishedRow], manifest: Manifest) -> list[str]:
    known = {slide.slide_id: slide for slide in manifest.slides}
    problems = []
    places: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        places[row.slide].append(f"{row.split} ({row.place})")
        slide = known.get(row.slide)
        if slide is None:
            problems.append(
                f"slide of the split must be in the cohort, got {row.slide!r} ({row.place}). "
                "HINT: is it the split of this dataset?"
            )
        elif row.label and row.label in manifest.classes and row.label != manifest.label_name(slide):
            problems.append(
                f"label must be the cohort's, {manifest.label_name(slide)}, got {row.label} "
                f"(slide {row.slide}, {row.place}). HINT: is it the split of this dataset?"
            )
    problems += [
        f"slide must be in the split once, got {slide!r} in {' and '.join(found)}. HINT: take one of them out."
        for slide, found in places.items()
        if len(found) > 1
    ]
    counts = Counter(row.split for row in rows)
    problems += [
        f"the {split} split must hold a slide, got none ({len(rows)} slides in the split). HINT: fetch the file anew."
        for split in ("train", "test")
        if not counts[split]
    ]
    return problems


def _read(path: Path, test: str) -> Iterator[PublishedRow]:
    if path.is_dir():
        yield from _panther(path, test)
    else:
        yield from _clam(path)


def _panther(folder: Path, test: str) -> Iterator[PublishedRow]:
    """Some of PANTHER's folders have no validation."""
    for name in ("train", "val", test):
        if name == "val" and not (folder / "val.csv").exists():
            continue
        split = "test" if name == test else split_of(name) or name
        for row in read_table(folder / f"{name}.csv", PANTHER_COLUMNS, ("slide",)):
            yield PublishedRow(row["slide"], split, row.place, row["patient"], row["label"])


def _clam(path: Path) -> Iterator[PublishedRow]:
    read_table(path, {name: (name,) for name in CLAM_COLUMNS}, CLAM_COLUMNS)  # refuses what is no such file
    headings, rows = read_delimited(path)
    for row in rows:
        for name in CLAM_COLUMNS:
            value = row[name]
            if value.lower() in NOT_THERE:
                continue
            slide = row[headings[0]] if value.lower() == "true" else value
            yield PublishedRow(slide, split_of(name) or name, f"{path.name}, row {row.line}")
