"""Corrected labels of CAMELYON (such as CAMELYON+, Ling 2025): they override the official ones, slide by slide.

The file is a CSV of slide (or image, slide_id, filename, slide_path) and label (or class, stage). A label is normal or
tumor, 0 or 1, a stage (negative, itc, micro, macro), or `remove` for a slide that should be left out. The file's name
is not the label: normal_034 holds a tumour, tumor_012 none.
"""

from pathlib import Path

from ds_wsi.bags.datasets.table import CohortBuilder, LabelRow, read_table
from ds_wsi.bags.tables.names import slide_name

STAGES = ("negative", "itc", "micro", "macro")
BINARY = ("normal", "tumor")
TARGETS = {"stage": STAGES, "tumor": BINARY}
REMOVE = "remove"
COLUMNS = {
    "slide": ("slide", "image", "slide_id", "filename", "slide_path"),
    "label": ("label", "class", "stage"),
}
# A number is no stage: publications number the stages in different orders.
AS_BINARY = {"0": "normal", "1": "tumor", "negative": "normal", "itc": "tumor", "micro": "tumor", "macro": "tumor"}
AS_STAGE = {"0": "negative", "normal": "negative"}


def as_target(label: str, target: str) -> str:
    """A label in the words of the target's classes; unknown ones are returned as they are."""
    return (AS_BINARY if target == "tumor" else AS_STAGE).get(label.lower(), label.lower())


def classes_of(target: str) -> tuple[str, ...]:
    """The classes of a target.

    Raises:
        ValueError: an unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}. HINT: check the spelling.")
    return TARGETS[target]


def read_corrections(builder: CohortBuilder, path: str | Path | None, target: str) -> dict[str, tuple[str, LabelRow]]:
    """Slide -> (label in the target's words, or `remove`, and its row); problems are noted in the builder."""
    corrected: dict[str, tuple[str, LabelRow]] = {}
    for row in read_table(path, COLUMNS, ("slide", "label")) if path else ():
        label = as_target(row["label"], target)
        hint = "write the label in these words; a number above 0 names no stage"
        builder.require(row, "corrected label", label, (*builder.classes, REMOVE), hint)
        name = slide_name(row["slide"])
        if name in corrected:
            builder.problems.append(
                f"slide must be corrected once, got {name!r} in {corrected[name][1].place} and {row.place}. "
                "HINT: take one of the rows out."
            )
        corrected.setdefault(name, (label, row))
    return corrected


def unknown_slides(builder: CohortBuilder, corrections: dict[str, tuple[str, LabelRow]], known: set[str]) -> None:
    """Note the corrected slides that are none of the dataset's."""
    builder.problems += [
        f"corrected slide must be in the label file, got {name!r} ({row.place}). HINT: is it the other CAMELYON's row?"
        for name, (_, row) in corrections.items()
        if name not in known
    ]
