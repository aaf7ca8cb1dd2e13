"""Any cohort with a label file: a CSV or TSV whose headings are told, slides anywhere below a folder."""

from collections import defaultdict
from pathlib import Path

from ds_wsi.bags.datasets.table import (
    IMAGE_SUFFIXES,
    CohortBuilder,
    LabelRow,
    read_table,
    slide_name,
)
from ds_wsi.bags.delimited import read_delimited
from ds_wsi.bags.manifest import SPLIT_ALIASES, SPLITS, Manifest, ManifestError, sorted_labels


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
    wanted = {
        "slide": slide_column,
        "label": label_column,
        "patient": patient_column,
        "split": split_column,
        "mpp": mpp_column,
    }
    columns = {name: (heading,) for name, heading in wanted.items() if heading}
    present = read_delimited(table)[0] if table.is_file() else []
    absent = [name for name, (heading,) in columns.items() if present and heading not in present]
    if absent:
        raise ManifestError(
            f"labels {table}",
            [
                f"labels must have a column {wanted[name]!r}, got {', '.join(present)} ({table.name}). "
                f"HINT: --{name}_column names yours."
                for name in absent
            ],
        )
    rows = read_table(table, columns, tuple(columns))
    builder = CohortBuilder(f"{table.name} with slides in {root}", sorted_labels(row["label"] for row in rows))
    places = _index(root)
    for row in rows:
        slide_id = slide_name(row["slide"])
        candidates = places[slide_id]
        if len(candidates) > 1:
            # A path in the table tells files of one name apart.
            parts = Path(row["slide"]).parts
            candidates = [path for path in candidates if path.parts[-len(parts) :] == parts] or candidates
        if len(candidates) > 1:
            builder.problems.append(
                f"slide must be one file, got {', '.join(map(str, candidates))} (slide {slide_id}, {row.place}). "
                "HINT: write the path below the folder in the label file."
            )
            continue
        if not row["label"]:
            builder.problems.append(
                f"label must be given, got none (slide {slide_id}, {row.place}). HINT: fill it in, or take the row out."
            )
        builder.add(
            row,
            slide_id,
            candidates,
            row["label"],
            patient_id=_patient(builder, row, patient_column),
            split=_split(builder, row, split_column),
            mpp=_mpp(builder, row),
        )
    return builder.finish()


def _index(root: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            found[slide_name(path.name)].append(path)
    return found


def _patient(builder: CohortBuilder, row: LabelRow, column: str | None) -> str:
    if column and not row["patient"]:
        builder.problems.append(
            f"{column} must name the patient, got nothing ({row.place}). HINT: fill it in, or take the row out."
        )
    return row["patient"]


def _split(builder: CohortBuilder, row: LabelRow, column: str | None) -> str | None:
    if column is None:
        return None
    split = SPLIT_ALIASES.get(row["split"], row["split"])
    builder.require(row, column, split, SPLITS, "every slide has a split, or the column is left out")
    return split


def _mpp(builder: CohortBuilder, row: LabelRow) -> float | None:
    try:
        return float(row["mpp"]) if row["mpp"] else None
    except ValueError:
        builder.problems.append(
            f"mpp must be a number of um/px, got {row['mpp']!r} ({row.place}). HINT: leave it empty where unknown."
        )
        return None
