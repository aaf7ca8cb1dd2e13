"""A cohort told in one block: slides, patients, labels and tiles of each split; and the classes a split lacks."""

from collections.abc import Mapping, Sequence

from ds_wsi.bags.manifest import Manifest, SlideEntry
from ds_wsi.bags.tables.values import SPLITS
from ds_wsi.bags.target_parts import targets_apart
from ds_wsi.runtime.log import logger
from ds_wsi.targets.choices import CLASSIFICATION, SEVERAL

SHOWN_CLASSES = 30


def log_cohort(manifest: Manifest, lengths: Sequence[int] = ()) -> None:
    """Log the block, and warn of classes that training or test lacks.

    Args:
        manifest: the slides, with their splits where there are some.
        lengths: tiles of each slide, where they are known.
    """
    logger.info("%s:\n%s", manifest.source, cohort_table(manifest, lengths))
    for problem in class_warnings(manifest):
        logger.warning("%s: %s", manifest.source, problem)


def cohort_table(manifest: Manifest, lengths: Sequence[int] = ()) -> str:
    """The block: one column per split and one of all, aligned; see `log_cohort`."""
    return _aligned(cohort_lines(manifest, lengths))


def cohort_lines(manifest: Manifest, lengths: Sequence[int] = ()) -> list[tuple[str, ...]]:
    """The block's lines: the columns' headings, then slides, patients, labels and tiles, each with its name first."""
    slides = manifest.slides
    rows_of = {split: [row for row, slide in enumerate(slides) if slide.split == split] for split in SPLITS}
    columns = {split: rows for split, rows in rows_of.items() if rows}
    # Several columns add up to it; of one split alone it would be that again.
    if len(columns) != 1 or len(next(iter(columns.values()))) < len(slides):
        columns["all"] = list(range(len(slides)))
    lines: list[tuple[str, ...]] = [("", *columns)]
    lines.append(("slides", *(str(sum(len(slides[row].slides) for row in rows)) for rows in columns.values())))
    lines.append(("patients", *(str(len({slides[row].patient_id for row in rows})) for rows in columns.values())))
    counted_classes = manifest.classes if manifest.kind in (CLASSIFICATION, "ordinal") else ()
    for index, name in enumerate(counted_classes[:SHOWN_CLASSES]):
        lines.append((f"label {name}", *(_count(slides, rows, index) for rows in columns.values())))
    if len(counted_classes) > SHOWN_CLASSES:
        lines.append((f"({len(counted_classes) - SHOWN_CLASSES} more labels)", *("" for _ in columns)))
    if manifest.kind == CLASSIFICATION:
        if any(slide.label is None for slide in slides):
            lines.append(("no label", *(_count(slides, rows, None) for rows in columns.values())))
    else:
        lines += _target_lines(manifest, columns)
    if lengths:
        taken = [[lengths[row] for row in rows] for rows in columns.values()]
        lines.append(("tiles", *(str(sum(tiles)) for tiles in taken)))
        bag = "patient" if any(slide.members for slide in slides) else "slide"
        lines.append((f"tiles per {bag}", *(f"{min(tiles)} to {max(tiles)}" for tiles in taken)))
    return lines


def _target_lines(manifest: Manifest, columns: Mapping[str, Sequence[int]]) -> list[tuple[str, ...]]:
    """What another task's block has beside grades: ranges, events, labels, and slides without a target."""
    if manifest.kind == SEVERAL:
        return [line for part in targets_apart(manifest) for line in _part_lines(part, columns)]
    slides, kind = manifest.slides, manifest.kind
    targets = {split: [slides[row].target for row in rows] for split, rows in columns.items()}
    lines: list[tuple[str, ...]] = []
    if kind == "survival":
        lines.append(("events", *(str(sum(target[-1:] == (1.0,) for target in some)) for some in targets.values())))
    if kind == "multilabel":
        for index, name in enumerate(manifest.classes[:SHOWN_CLASSES]):
            counts = (sum(target[index : index + 1] == (1.0,) for target in some) for some in targets.values())
            lines.append((f"label {name}", *map(str, counts)))
    if kind in ("survival", "regression"):
        numbers = ([target[0] for target in some if target and target[0] is not None] for some in targets.values())
        ranges = (f"{min(some):g} to {max(some):g}" if some else "none" for some in numbers)
        lines.append((manifest.columns.names[0], *ranges))
    missing = (sum(not slides[row].is_labelled for row in rows) for rows in columns.values())
    return [*lines, ("no target", *map(str, missing))]


def _part_lines(part: Manifest, columns: Mapping[str, Sequence[int]]) -> list[tuple[str, ...]]:
    """The lines of one of several targets, whose name stands before what is no column."""
    name = part.columns.name
    lines: list[tuple[str, ...]] = []
    if part.kind == "ordinal":
        for index, grade in enumerate(part.classes[:SHOWN_CLASSES]):
            lines.append((f"{name} {grade}", *(_count(part.slides, rows, index) for rows in columns.values())))
    of_target = _target_lines(part, columns)
    return lines + [
        (f"{name}: {head}" if head in ("no target", "events") else head, *rest) for head, *rest in of_target
    ]


def class_warnings(manifest: Manifest) -> list[str]:
    """Classes without slides to train on, which are not learned, or to test on, which are not measured."""
    train, test = manifest.in_split("train"), manifest.in_split("test")
    if not train or manifest.kind not in (CLASSIFICATION, "ordinal"):
        return []
    warnings = []
    trained, tested = ({slide.label for slide in part} for part in (train, test))
    for index, name in enumerate(manifest.classes):
        if index not in trained:
            others = [split for split in SPLITS[1:] if any(s.label == index for s in manifest.in_split(split))]
            where = f"occurs in {' and '.join(others)} alone" if others else "has no slide"
            warnings.append(
                f"class {name} {where}: nothing is learned of it. HINT: another split, or take its rows out"
            )
        elif test and index not in tested:
            warnings.append(f"class {name} has no slide in the test split, which leaves its metrics undefined")
    return warnings


def _count(slides: Sequence[SlideEntry], rows: Sequence[int], label: int | None) -> str:
    return str(sum(slides[row].label == label for row in rows))


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  " + "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
