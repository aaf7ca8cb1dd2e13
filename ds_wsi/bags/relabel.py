"""Classes of one cohort in the words, or the order, of another: explicit, and refused where the two disagree."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ds_wsi.bags.manifest import Manifest


def map_labels(manifest: Manifest, classes: Sequence[str], mapping: Mapping[str, str] | None = None) -> Manifest:
    """The cohort with a model's classes, in their order.

    Args:
        manifest: an external set's, say.
        classes: the model's.
        mapping: the cohort's class -> the model's; classes that are called the same need no entry.

    Raises:
        ValueError: a class that occurs in the cohort is none of the model's, or an entry names a class that neither
            has; names both sides.
    """
    mapping = dict(mapping or {})
    both = f"the cohort's are {', '.join(manifest.classes)} ({manifest.source}), the model's {', '.join(classes)}"
    unknown = [name for name in mapping if name not in manifest.classes]
    unknown += [name for name in mapping.values() if name not in classes]
    if unknown:
        raise ValueError(f"--map_labels must map the cohort's classes to the model's, got {unknown[0]!r}: {both}.")
    occurring = sorted({slide.label for slide in manifest.slides if slide.label is not None})
    lost = [name for name in (manifest.classes[label] for label in occurring) if mapping.get(name, name) not in classes]
    if lost:
        example = ",".join(f"{name}=..." for name in lost)
        raise ValueError(
            f"classes must be the model's, got {', '.join(lost)}: {both}. "
            f"HINT: say which of the model's each is, with --map_labels {example}."
        )
    index = {label: classes.index(mapping.get(manifest.classes[label], manifest.classes[label])) for label in occurring}
    slides = tuple(
        slide if slide.label is None else replace(slide, label=index[slide.label]) for slide in manifest.slides
    )
    return replace(manifest, slides=slides, classes=tuple(classes))


def order_classes(manifest: Manifest, classes: Sequence[str] | None) -> Manifest:
    """The cohort with its classes in another order; None leaves it.

    Raises:
        ValueError: other classes than the cohort's.
    """
    if classes is None:
        return manifest
    if sorted(classes) != sorted(manifest.classes):
        raise ValueError(
            f"--classes must be the cohort's in the order of the logits, {', '.join(manifest.classes)}, "
            f"got {', '.join(classes)} ({manifest.source})."
        )
    return map_labels(manifest, classes)


def with_positive(manifest: Manifest, positive: str | None) -> Manifest:
    """The cohort with this class second of its two, which metrics take as the positive one; None leaves it.

    Raises:
        ValueError: no class of the cohort's, or a cohort of more than two.
    """
    if positive is None:
        return manifest
    if len(manifest.classes) != 2 or positive not in manifest.classes:
        raise ValueError(
            f"--positive_class must be one of two classes, got {positive} of {', '.join(manifest.classes)} "
            f"({manifest.source}). HINT: leave it out; of more than two classes f1 and auc are means over all."
        )
    return map_labels(manifest, tuple(sorted(manifest.classes, key=lambda name: name == positive)))
