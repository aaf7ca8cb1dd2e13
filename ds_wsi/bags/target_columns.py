"""Targets other than a class: which columns of the table hold them, what their cells say, and what is wrong there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from ds_wsi.bags.tables.labels import sorted_labels
from ds_wsi.bags.tables.read import Table, TableRow
from ds_wsi.bags.tables.values import number_of, says_missing
from ds_wsi.targets.choices import CLASSIFICATION, SEVERAL

# What a cell says whichever the column is, and what it says of the column's own word.
EVENT_WORDS, CENSORED_WORDS = ("event", "dead", "deceased"), ("censored", "alive", "living")
YES_WORDS, NO_WORDS = ("1", "yes", "y", "true"), ("0", "no", "n", "false")

Target = tuple[float | None, ...]


@dataclass(frozen=True)
class TargetColumns:
    """The columns that hold the targets.

    Args:
        kind: a key of `LOSSES_OF`.
        labels: the column of a class, value or grade; of several labels one each. None of survival.
        time: column of the times, of survival alone.
        event: column of who had the event, or with `censored` of who had not.
        censored: whether 1 in the column `event` says censored.
        strata: column of the strata, of survival alone; None: one.
        name: what the target is called among several.
        classes: the grades of a target among several, in their order; empty: numbers, which sort themselves.
        parts: the targets, of the kind "several" alone.
    """

    kind: str = CLASSIFICATION
    labels: tuple[str, ...] = ("label",)
    time: str | None = None
    event: str | None = None
    censored: bool = False
    strata: str | None = None
    name: str = ""
    classes: tuple[str, ...] = ()
    parts: tuple["TargetColumns", ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of the targets, in their order."""
        if self.kind == SEVERAL:
            return tuple(name for part in self.parts for name in part.names)
        if self.kind == "survival":
            return tuple(name for name in (self.time, self.event) if name is not None)
        return self.labels

    @property
    def places(self) -> "tuple[tuple[TargetColumns, slice], ...]":
        """Each target, of several or alone, with its places among the values of a slide."""
        ends = list(accumulate(len(part.names) for part in self.parts))
        places = [slice(end - len(part.names), end) for part, end in zip(self.parts, ends, strict=True)]
        return tuple(zip(self.parts, places, strict=True)) or ((self, slice(None)),)

    @property
    def used(self) -> tuple[str, ...]:
        """All columns, that of the strata among them."""
        return self.names if self.strata is None else (*self.names, self.strata)


ONE_CLASS = TargetColumns()


class TargetsRead(NamedTuple):
    """What a table's columns hold.

    Attributes:
        classes: grades in their order, or the labels' names; none of several targets.
        targets: one per row, see `Task`; None in it: an empty cell.
        strata: one per row; None without a column.
        problems: all of all rows.
        columns: the columns, of several targets with the classes of each.
    """

    classes: tuple[str, ...]
    targets: tuple[Target, ...]
    strata: tuple[str | None, ...]
    problems: list[str]
    columns: TargetColumns


def read_targets(table: Table, columns: TargetColumns, classes: Sequence[str] | None) -> TargetsRead:
    """Read the targets of a table's rows; columns that are not there are columns of empty cells.

    Args:
        table: the table in our headings.
        columns: the columns, of another kind than classification.
        classes: an ordinal's grades in their order; None where they are numbers, which sort themselves.
    """
    if columns.kind == SEVERAL:
        return _read_several(table, columns)
    names = _classes(table, columns, classes)
    problems = _order_problems(names, columns, given=bool(classes)) if columns.kind == "ordinal" else []
    targets: list[Target] = []
    for row in table.rows:
        cells = [_cell(row, name, columns, names, table.decimal_comma) for name in columns.names]
        problems += [problem for _, problem in cells if problem is not None]
        values = tuple(value for value, _ in cells)
        if columns.kind == "survival":
            problems += _half_problems(row, columns, values)
            values = values if None not in values else (None, None)
        targets.append(values)
    strata = tuple(None if columns.strata is None else row[columns.strata] for row in table.rows)
    for row, stratum in zip(table.rows, strata, strict=True):
        if stratum is not None and (not stratum or says_missing(stratum)):
            problems.append(
                f"{columns.strata} must name the stratum, got {stratum!r} ({_place(row)}). HINT: fill it in, or train "
                "without --strata_column."
            )
    return TargetsRead(names, tuple(targets), strata, problems, columns)


def _read_several(table: Table, columns: TargetColumns) -> TargetsRead:
    """The targets of each row one after the other."""
    each = [read_targets(table, part, part.classes) for part in columns.parts]
    targets = tuple(sum(of_row, ()) for of_row in zip(*(read.targets for read in each), strict=True))
    parts = tuple(replace(part, classes=read.classes) for part, read in zip(columns.parts, each, strict=True))
    problems = [problem for read in each for problem in read.problems]
    return TargetsRead((), targets, (None,) * len(targets), problems, replace(columns, parts=parts))


def _classes(table: Table, columns: TargetColumns, classes: Sequence[str] | None) -> tuple[str, ...]:
    if columns.kind == "multilabel":
        return columns.labels
    if columns.kind != "ordinal":
        return ()
    if classes:
        return tuple(classes)
    name = columns.labels[0]
    return table.names.get(name) or sorted_labels(row[name] for row in table.rows if not says_missing(row[name]))


def _order_problems(classes: Sequence[str], columns: TargetColumns, *, given: bool) -> list[str]:
    name, shown = columns.labels[0], ", ".join(classes) or "none"
    if len(classes) < 2:
        return [f"{name} must take at least two grades, got {shown}. HINT: --classes a<b<c names all of them."]
    if not given and any(number_of(grade) is None for grade in classes):
        return [
            f"the order of the grades of {name} must be said where they are no numbers, got {shown}. HINT: --classes "
            f"'{'<'.join(classes)}', in their order from low to high."
        ]
    return []


def _cell(
    row: TableRow, name: str, columns: TargetColumns, classes: Sequence[str], decimal_comma: bool
) -> tuple[float | None, str | None]:
    """A cell's number, None where it is empty or wrong; and what is wrong with it."""
    text = row[name]
    if not text:
        return None, None
    hint = "leave the cell empty where it is not known" if says_missing(text) else "correct the row"
    if columns.kind == "ordinal":
        if text in classes:
            return float(list(classes).index(text)), None
        return None, f"{name} must be one of {', '.join(classes)}, got {text!r} ({_place(row)}). HINT: {hint}."
    if columns.kind == "multilabel":
        value = _truth(text, (*YES_WORDS, name.casefold()), NO_WORDS)
        if value is not None:
            return value, None
        return None, f"{name} must be 1 or 0 (yes or no), got {text!r} ({_place(row)}). HINT: {hint}."
    if name == columns.event:
        yes, no = (NO_WORDS, YES_WORDS) if columns.censored else (YES_WORDS, NO_WORDS)
        value = _truth(text, (*EVENT_WORDS, *yes), (*CENSORED_WORDS, *no))
        if value is not None:
            return value, None
        words = f"{', '.join((*YES_WORDS, *NO_WORDS, *EVENT_WORDS, *CENSORED_WORDS))}"
        return None, f"{name} must be one of {words}, got {text!r} ({_place(row)}). HINT: {hint}."
    value = number_of(text, decimal_comma)
    if value is None:
        return None, f"{name} must be a number, got {text!r} ({_place(row)}). HINT: {hint}."
    if columns.kind == "survival" and value <= 0:
        hint = "a time counts from diagnosis or surgery; leave the cell empty where it is not known"
        return None, f"{name} must be positive, got {text} ({_place(row)}). HINT: {hint}."
    return value, None


def _truth(text: str, yes: Sequence[str], no: Sequence[str]) -> float | None:
    word = text.casefold()
    return 1.0 if word in yes else 0.0 if word in no else None


def _half_problems(row: TableRow, columns: TargetColumns, values: Target) -> list[str]:
    """A time without what happened then, or the other way round; not where a cell is wrong, which is told already."""
    names = [name for name, value in zip(columns.names, values, strict=True) if value is None and not row[name]]
    if len(names) != 1 or all(value is None for value in values):
        return []
    other = next(name for name in columns.names if name not in names)
    return [
        f"{names[0]} must be given where {other} is, got an empty cell ({_place(row)}). HINT: fill it in, or leave "
        "both empty."
    ]


def _place(row: TableRow) -> str:
    return f"slide {row['slide_id']}, {row.place}"


def patient_target_problems(columns: TargetColumns, targets: Mapping[str, Mapping[Target, Sequence[str]]]) -> list[str]:
    """Name each patient whose slides have several follow-ups: it is the patient who is followed.

    Args:
        columns: the columns.
        targets: patient -> target -> the slides that have it.
    """
    if columns.kind == SEVERAL:
        problems = []
        for part, columns_of_part in columns.places:
            of_part: dict[str, dict[Target, list[str]]] = {}
            for patient, of_patient in targets.items():
                for target, slides in of_patient.items():
                    of_part.setdefault(patient, {}).setdefault(target[columns_of_part], []).extend(slides)
            problems += patient_target_problems(part, of_part)
        return problems
    if columns.kind != "survival":
        return []
    return [
        f"patient {patient} must have one {columns.time} and {columns.event}, got "
        + " and ".join(f"{_words(target)} ({', '.join(slides)})" for target, slides in of_patient.items())
        + ". HINT: correct the rows."
        for patient, of_patient in targets.items()
        if len(of_patient) > 1
    ]


def _words(target: Target) -> str:
    time, event = target
    return "none" if time is None else f"{time:g} {'with' if event else 'without'} event"


def draw_strata(kind: str, targets: Sequence[Target], patients: Sequence[str]) -> list[int]:
    """The stratum of each slide in a draw of splits; -1 without a target.

    Of a value the fifth of the patients' means in which its patient's lies; of survival whether the event was seen; of
    several labels which of them are there; of a grade the grade.
    """
    if kind == "survival":
        return [-1 if time is None else int(event or 0) for time, event in targets]
    if kind == "multilabel":
        digits = [[0 if value is None else int(value) + 1 for value in target] for target in targets]
        return [sum(3**index * digit for index, digit in enumerate(each)) if any(each) else -1 for each in digits]
    if kind == "ordinal":
        return [-1 if target[0] is None else int(target[0]) for target in targets]
    values: dict[str, list[float]] = {}
    for patient, (value,) in zip(patients, targets, strict=True):
        if value is not None:
            values.setdefault(patient, []).append(value)
    means = {patient: sum(of_patient) / len(of_patient) for patient, of_patient in values.items()}
    order = {patient: index for index, patient in enumerate(sorted(means, key=lambda name: (means[name], name)))}
    return [order[patient] * 5 // len(order) if patient in order else -1 for patient in patients]
