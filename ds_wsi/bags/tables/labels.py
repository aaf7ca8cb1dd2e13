"""Classes of a table: the order of its labels, and what is wrong with their spellings."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ds_wsi.bags.tables.values import number_of, says_missing, spelled_several_ways, spelling_key


def sorted_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """The labels that occur, each once, empty ones left out: sorted, by value where all are numbers (2, 10; 0.5, 1)."""
    found = sorted({label for label in labels if label})
    values = {label: number_of(label, decimal_comma=True) for label in found}
    if all(value is not None for value in values.values()):
        return tuple(sorted(found, key=lambda label: values[label] or 0.0))
    return tuple(found)


def spelling_problems(labels: Sequence[str], apart: str = "") -> list[str]:
    """A problem for each class that is spelled in several ways: Tumor and tumor, 1 and 1.0, high grade and high-grade.

    Args:
        labels: one per row.
        apart: what can be done where they are different classes, to end the hint.
    """
    problems = []
    for group in spelled_several_ways(label for label in labels if label):
        counts = {spelling: labels.count(spelling) for spelling in group}
        best = max(group, key=lambda spelling: counts[spelling])
        shown = ", ".join(f"{spelling!r} in {count}" for spelling, count in counts.items())
        problems.append(
            f"label must be spelled one way for a class, got {shown} rows. HINT: write {best!r} everywhere{apart}."
        )
    return problems


def label_problems(
    labels: Sequence[str],
    places: Sequence[str],
    classes: Sequence[str],
    *,
    given: bool,
    empty_ok: bool,
    remedy: str = "",
    apart: str = "",
) -> list[str]:
    """What is wrong with labels: none, a word for none, no class, or a class in several spellings.

    Args:
        labels: one per row.
        places: where each row stands, for messages.
        classes: class names in the order of the logits.
        given: the classes were given, so that they decide what is a label; else they are the labels found.
        empty_ok: a row need not have a label.
        remedy: what else can be done about a label that is no class, to end the hint.
        apart: see `spelling_problems`.
    """
    problems = []
    where: Mapping[str, list[str]] = defaultdict(list)
    for label, place in zip(labels, places, strict=True):
        where[label].append(place)
    for label, rows in where.items():
        if label in classes and (given or not says_missing(label)):
            continue
        if label == "" and empty_ok:
            continue
        known = [name for name in classes if not says_missing(name) or given]
        problems += [
            f"label must be one of {', '.join(known) or 'at least two classes'}, got {label!r} ({place}). "
            f"HINT: {_hint(label, known, empty_ok=empty_ok, remedy=remedy)}."
            for place in rows
        ]
    return (
        problems if given else problems + spelling_problems([name for name in labels if not says_missing(name)], apart)
    )


def _hint(label: str, classes: Sequence[str], *, empty_ok: bool, remedy: str) -> str:
    same = next((name for name in classes if label and spelling_key(name) == spelling_key(label)), None)
    if same is not None:
        return f"write {same!r}"
    if label and not says_missing(label):
        return f"correct the row{remedy}"
    if empty_ok:
        return "leave it empty where there is no label"
    named = f"; where {label!r} is a class, name all with --classes" if label else ""
    return f"fill it in, or take the row out{named}"
