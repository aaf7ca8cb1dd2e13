"""A project's cohorts as our tables: one CSV per fold, read back and checked before any is in its place."""

import csv
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ds_wsi.bags.manifest import Manifest, ManifestError, parse_manifest
from ds_wsi.bags.projects.cells import EVENT, ProjectCohort
from ds_wsi.bags.tables.names import IMAGE_SUFFIXES, slide_name
from ds_wsi.bags.target_columns import ONE_CLASS, TargetColumns
from ds_wsi.runtime.files import write_text
from ds_wsi.runtime.own_files import begins_with, require_ours

HEAD = "slide_id,patient_id,split,"  # with which each table here begins


def write_cohorts(
    cohorts: Sequence[ProjectCohort], path: str | Path, slides_dir: str | Path | None = None
) -> tuple[tuple[Path, Manifest], ...]:
    """Write a single cohort to `path`, several to it with _0, _1, ... before the suffix.

    Args:
        cohorts: what `read_project` returned.
        path: the CSV.
        slides_dir: the folder below which the slides lie; None writes no column path: for features.

    Raises:
        ManifestError: lists every problem of the tables, such as a patient in two splits, or a slide without a file.
        ValueError: another program's file has one of the names.
    """
    path = Path(path)
    several = [path.with_name(f"{path.stem}_{number}{path.suffix}") for number in range(len(cohorts))]
    paths = several if len(cohorts) > 1 else [path]
    for target in paths:
        require_ours(target, lambda file: begins_with(file, HEAD), "the table's name")
    files = None if slides_dir is None else _slides_below(Path(slides_dir))
    texts = [_text(cohort, files) for cohort in cohorts]
    read = [_checked(text, cohort, need_slides=files is not None) for text, cohort in zip(texts, cohorts, strict=True)]
    for target, text in zip(paths, texts, strict=True):
        write_text(target, text)
    return tuple(zip(paths, read, strict=True))


def columns_of(cohort: ProjectCohort) -> TargetColumns:
    """The columns by which our commands read the cohort's table."""
    if cohort.time is None:
        return ONE_CLASS
    return TargetColumns("survival", (), cohort.time, EVENT)


def _text(cohort: ProjectCohort, files: dict[str, Path] | None) -> str:
    headings = ["slide_id", "patient_id", "split", *cohort.targets, *([] if files is None else ["path"])]
    lines = [headings]
    for row in cohort.rows:
        cells = {**row, "path": str((files or {}).get(row["slide_id"], ""))}
        lines.append([cells.get(heading, "") for heading in headings])
    with tempfile.TemporaryFile("w+", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
        file.seek(0)
        return file.read()


def _checked(text: str, cohort: ProjectCohort, *, need_slides: bool) -> Manifest:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cohort.csv"
        file.write_text(text, encoding="utf-8")
        manifest, problems = parse_manifest(file, need_slides=need_slides, columns=columns_of(cohort))
    if problems:
        raise ManifestError("the table in our columns", problems)
    return manifest


def _slides_below(folder: Path) -> dict[str, Path]:
    """Slides by name.

    Raises:
        ManifestError: a name is there twice.
    """
    paths: dict[str, Path] = {}
    problems = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
            continue
        first = paths.setdefault(slide_name(path.name), path.absolute())
        if first != path.absolute():
            problems.append(f"a slide must lie in one file, got {first} and {path}. HINT: move one of them away.")
    if problems:
        raise ManifestError(f"slides below {folder}", problems)
    return paths
