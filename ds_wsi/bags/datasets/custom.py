"""Any cohort with a label file: a CSV or TSV whose headings are told, slides anywhere below a folder."""

import difflib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_wsi.bags.datasets.table import CohortBuilder, LabelRow, classes_in, read_table
from ds_wsi.bags.delimited import read_delimited
from ds_wsi.bags.manifest import SPLITS, Manifest, ManifestError
from ds_wsi.bags.tables.headings import meant, plain
from ds_wsi.bags.tables.names import IMAGE_SUFFIXES, path_name, slide_name
from ds_wsi.bags.tables.values import mpp_of, says_missing, split_hint, split_of
from ds_wsi.runtime.log import logger

# Column that a heading means -> the option that names it.
OPTIONAL = {"patient_id": "patient", "split": "split", "mpp": "mpp"}


def read_custom(
    root: str | Path,
    labels: str | Path | None = None,
    *,
    slide_column: str = "slide_id",
    label_column: str = "label",
    patient_column: str | None = None,
    split_column: str | None = None,
    mpp_column: str | None = None,
) -> Manifest:
    """Read a cohort from a label file of your own; classes are the labels found, sorted, numbers by value.

    A slide is named by its file; where names repeat, by its path below the folder (P1/1.svs is P1_1). Columns that are
    not used are named in the log, with a warning where one looks like the patient, the split or the resolution.

    Args:
        root: slides lie anywhere below it.
        labels: a CSV or TSV, by default the `labels.csv` in `root`.
        slide_column: heading of the slide: a name with or without the file's suffix, or a path that ends with it.
        label_column: heading of the label.
        patient_column: heading of the patient; without it each slide is a patient of its own.
        split_column: heading of the split (train, validation or val, test); without it there is none yet.
        mpp_column: heading of the resolution, um/px, for slides that do not tell theirs.

    Raises:
        ManifestError: lists every problem of every row at once.
    """
    root = Path(root)
    if not root.is_dir():
        problem = f"folder of the slides must be there, got none ({root}). HINT: give the folder below which they lie."
        raise ManifestError(f"cohort in {root}", [problem])
    table = Path(labels or root / "labels.csv")
    headings = {
        "slide": slide_column,
        "label": label_column,
        "patient": patient_column,
        "split": split_column,
        "mpp": mpp_column,
    }
    rows = _rows(table, headings)
    builder = CohortBuilder(f"{table.name} with slides in {root}", classes_in(rows))
    builder.check_spellings(rows)
    files = _SlideFiles(root, _index(root), _named_by_path(rows, table))
    for row in rows:
        _add_slide(builder, row, files, headings)
    return builder.finish()


def _rows(table: Path, headings: Mapping[str, str | None]) -> list[LabelRow]:
    """The table's rows under the headings that are given; columns that are not used are named in the log.

    Raises:
        ManifestError: the table lacks one of the headings, or cannot be read.
    """
    columns = {name: (heading,) for name, heading in headings.items() if heading}
    present = read_delimited(table)[0] if table.is_file() else []
    absent = [name for name, (heading,) in columns.items() if present and heading not in present]
    if absent:
        raise ManifestError(
            f"labels {table}",
            [
                f"labels must have a column {headings[name]!r}, got {', '.join(present)} ({table.name}). "
                f"HINT: --{name}_column names yours."
                for name in absent
            ],
        )
    _tell_unused(table, present, headings)
    return read_table(table, columns, tuple(columns))


@dataclass(frozen=True)
class _SlideFiles:
    """The image files of a cohort.

    Attributes:
        root: the folder that they lie below.
        by_name: a slide's name -> the files of that name.
        repeated: names of files that rows with different paths share; these slides are named by their paths.
    """

    root: Path
    by_name: Mapping[str, list[Path]]
    repeated: set[str]

    def candidates(self, row: LabelRow) -> list[Path]:
        """The files that a row may mean: those of the slide's name, of which a path in the row tells some apart."""
        candidates = self.by_name.get(slide_name(row["slide"]), [])
        if len(candidates) < 2:
            return candidates
        parts = Path(row["slide"].replace("\\", "/")).parts
        return [path for path in candidates if _ends_with(path, parts)] or candidates

    def name_of(self, row: LabelRow, path: Path) -> str:
        """The slide's id: its file's name, or its path below the folder where names repeat."""
        slide_id = slide_name(row["slide"])
        return path_name(str(path.relative_to(self.root))) if slide_id in self.repeated else slide_id


def _add_slide(builder: CohortBuilder, row: LabelRow, files: _SlideFiles, headings: Mapping[str, str | None]) -> None:
    """Add a row's slide to the cohort, or what is wrong with the row to its problems."""
    slide_id, candidates = slide_name(row["slide"]), files.candidates(row)
    if len(candidates) > 1:
        builder.problems.append(
            f"slide must be one file, got {', '.join(map(str, candidates))} (slide {slide_id}, {row.place}). "
            "HINT: write the path below the folder in the label file."
        )
        return
    builder.check_label(row, slide_id)
    patient = _patient(builder, row, headings["patient"])
    split = _split(builder, row, headings["split"])
    mpp = _mpp(builder, row)
    if not candidates:
        builder.problems.append(_no_file(slide_id, row, files.by_name))
        return
    slide_id = files.name_of(row, candidates[0])
    builder.add(row, slide_id, candidates, row["label"], patient_id=patient, split=split, mpp=mpp)


def _index(root: Path) -> dict[str, list[Path]]:
    paths: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            paths[slide_name(path.name)].append(path)
    return dict(paths)


def _ends_with(path: Path, parts: Sequence[str]) -> bool:
    """Whether a file's path ends with these parts; the last may lack the suffix."""
    *folders, name = parts
    return name in (path.name, slide_name(path.name)) and path.absolute().parts[-len(parts) : -1] == tuple(folders)


def _named_by_path(rows: Sequence[LabelRow], table: Path) -> set[str]:
    """The files' names that rows with different paths share."""
    paths = {(slide_name(row["slide"]), row["slide"].replace("\\", "/")) for row in rows}
    several = {name for name, count in Counter(name for name, _ in paths).items() if count > 1}
    if several:
        logger.info("%s: %d names of files repeat: these slides are named by path", table.name, len(several))
    return several


def _tell_unused(table: Path, present: Sequence[str], headings: Mapping[str, str | None]) -> None:
    others = [heading for heading in present if heading and heading not in headings.values()]
    if others:
        logger.info("%s: columns that are not used: %s", table.name, ", ".join(others))
    for heading in others:
        column = meant(heading) or next((option for option in OPTIONAL if plain(option) == plain(heading)), "")
        name = OPTIONAL.get(column)
        if name and not headings[name]:
            logger.warning(
                "%s: column %r looks like the %s. HINT: --%s_column %r", table.name, heading, name, name, heading
            )


def _no_file(slide_id: str, row: LabelRow, places: Mapping[str, list[Path]]) -> str:
    begin = [name for name in places if slide_id and name.startswith(slide_id)]
    near = (begin + difflib.get_close_matches(slide_id, places, 3, 0.7))[:3]
    nearest = f"nearest are {', '.join(dict.fromkeys(near))}; " if near else ""
    return (
        f"image must be a file, got none of that name in the folder (slide {slide_id}, {row.place}). HINT: {nearest}"
        "--slide_column names the column with the file; or fetch it, or take the row out of the label file."
    )


def _patient(builder: CohortBuilder, row: LabelRow, column: str | None) -> str:
    patient = row["patient"]
    if column and (not patient or says_missing(patient)):
        builder.problems.append(
            f"{column} must name the patient, got {repr(patient) if patient else 'nothing'} ({row.place}). "
            "HINT: fill it in, or take the row out."
        )
    return patient


def _split(builder: CohortBuilder, row: LabelRow, column: str | None) -> str | None:
    if column is None:
        return None
    split = split_of(row["split"]) or row["split"]
    every = "every slide has a split, or the column is left out"
    builder.require(row, column, split, SPLITS, split_hint(split) if split and not says_missing(split) else every)
    return split


def _mpp(builder: CohortBuilder, row: LabelRow) -> float | None:
    mpp, problem = mpp_of(row["mpp"], row.decimal_comma, row.place)
    if problem is not None:
        builder.problems.append(problem)
    return mpp
