"""A cohort of several targets as cohorts of one each: what is told of a target alone is told of each by itself."""

from dataclasses import replace

from ds_wsi.bags.manifest import Manifest, SlideEntry
from ds_wsi.bags.target_columns import TargetColumns


def targets_apart(manifest: Manifest) -> list[Manifest]:
    """The cohort once per target, with that target alone; of one target the cohort itself."""
    if not manifest.columns.parts:
        return [manifest]
    each = []
    for columns, values in manifest.columns.places:
        slides = tuple(with_target(slide, columns.kind, values) for slide in manifest.slides)
        each.append(replace(manifest, slides=slides, classes=_classes(columns), columns=columns))
    return each


def with_target(slide: SlideEntry, kind: str, values: slice) -> SlideEntry:
    """The slide with one of several targets alone; a grade is its label too."""
    target = slide.target[values]
    label = int(target[0]) if kind == "ordinal" and target and target[0] is not None else None
    return replace(slide, target=target, label=label)


def _classes(columns: TargetColumns) -> tuple[str, ...]:
    return columns.labels if columns.kind == "multilabel" else columns.classes
