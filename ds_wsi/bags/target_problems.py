"""What is wrong with the targets of a cohort's splits: known once every slide has its split."""

from collections.abc import Sequence

from ds_wsi.bags.manifest import Manifest
from ds_wsi.bags.tables.values import SPLITS
from ds_wsi.bags.target_columns import Target
from ds_wsi.bags.target_parts import targets_apart
from ds_wsi.runtime.log import logger
from ds_wsi.targets.choices import CLASSIFICATION, SEVERAL

MOST_CENSORED = 0.9


def split_target_problems(manifest: Manifest) -> list[str]:
    """All problems of all splits; none of classification. A split that is mostly censored is warned of.

    A split without a target is one, or of survival without an event; and training slides that all have one value.
    """
    if manifest.kind == CLASSIFICATION:
        return []
    if manifest.kind == SEVERAL:
        return [problem for part in targets_apart(manifest) for problem in split_target_problems(part)]
    problems = []
    names = ", ".join(manifest.columns.names)
    for split in SPLITS:
        slides = manifest.in_split(split)
        targets = [slide.target for slide in slides if slide.is_labelled]
        if slides and not targets:
            problems.append(
                f"the {split} split must have a target, got none in {names} of {len(slides)} slides. HINT: fill the "
                "column in, or give other slides this split."
            )
        elif targets and manifest.kind == "survival":
            problems += _event_problems(manifest, split, targets)
        if targets and split == "train":
            problems += _one_value_problems(manifest, targets)
    return problems


def _event_problems(manifest: Manifest, split: str, targets: Sequence[Target]) -> list[str]:
    events = sum(target[1] == 1 for target in targets)
    columns = manifest.columns
    if events == 0:
        other = "--event_column" if columns.censored else "--censorship_column"
        return [
            f"the {split} split must have an event, got none in {columns.event} of {len(targets)} slides. HINT: look "
            f"whether the column's meaning is the other one ({other}), or draw other splits."
        ]
    if 1 - events / len(targets) > MOST_CENSORED:
        logger.warning(
            "%s: %d of %d slides of the %s split are censored: few events tell little",
            *(manifest.source, len(targets) - events, len(targets), split),
        )
    return []


def _one_value_problems(manifest: Manifest, targets: Sequence[Target]) -> list[str]:
    if manifest.kind == "survival":
        return []
    problems = []
    for index, name in enumerate(manifest.columns.names):
        values = {target[index] for target in targets} - {None}
        if len(values) < 2:
            shown = ", ".join(f"{value:g}" for value in values if value is not None) or "none"
            if manifest.kind == "ordinal" and values:
                shown = manifest.classes[int(next(value for value in values if value is not None))]
            problems.append(
                f"{name} must differ within the training split, got {shown} alone. HINT: take another column, or leave "
                "it out."
            )
    return problems
