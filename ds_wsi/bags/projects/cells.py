"""What the readers of projects share: their options, cells in our words, and folds from files of lists."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ds_wsi.bags.delimited import read_delimited
from ds_wsi.bags.manifest import ManifestError
from ds_wsi.bags.published import NOT_THERE, find_folds
from ds_wsi.bags.tables.names import slide_name
from ds_wsi.bags.tables.read import Table, TableRow, read_table_file
from ds_wsi.bags.tables.values import number_of, says_missing, split_of
from ds_wsi.bags.target_columns import CENSORED_WORDS, EVENT_WORDS, NO_WORDS, YES_WORDS
from ds_wsi.runtime.log import logger

EVENT, LABEL = "event", "label"
LISTS = ("train", "val", "test")


@dataclass(frozen=True)
class Asked:
    """What a project's tables do not say of themselves.

    Args:
        split: the folder of splits_0.csv, ..., or one of these files; None: the table's own, or none.
        endpoint: the follow-up that is taken where the table has several, such as os or dss.
        label_column, time_column, event_column: headings of STAMP's clini table; 1 in the last: the event came.
        keep_listed: drop slides that a split does not name.
    """

    split: str | Path | None = None
    endpoint: str | None = None
    label_column: str | None = None
    time_column: str | None = None
    event_column: str | None = None
    keep_listed: bool = False


@dataclass(frozen=True)
class ProjectCohort:
    """One fold's slides, or all of them.

    Attributes:
        rows: slide_id, patient_id, the targets, and the split where there is one, by our headings.
        time: heading of the times, where the cohort is followed; the event's is `event`, 1: it came.
    """

    rows: tuple[Mapping[str, str], ...]
    time: str | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """Headings of the targets."""
        return (LABEL,) if self.time is None else (self.time, EVENT)


@dataclass
class Problems:
    """What is wrong with a project's tables, raised all at once."""

    source: str
    lines: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise ManifestError where anything is wrong."""
        if self.lines:
            raise ManifestError(self.source, self.lines)

    def time(self, row: TableRow, heading: str) -> str:
        """A time as it stands; "" where it is missing: empty, a word for none, or -1."""
        text = row[heading]
        value = number_of(text)
        if not text or says_missing(text) or value == -1:
            return ""
        if value is None or value < 0:
            self.lines.append(
                f"{heading} must be a time, or empty or -1 where there is none, got {text!r} ({row.place}). HINT: "
                "correct the row."
            )
        return text

    def event(self, row: TableRow, heading: str, *, censored: bool) -> str:
        """1 where the event came, 0 where it did not, "" where it is missing.

        Args:
            row: the row.
            heading: the column's.
            censored: whether 1 in the column says censored.
        """
        text = row[heading]
        value, word = number_of(text), text.casefold()
        if not text or says_missing(text) or value == -1:
            return ""
        yes, no = (NO_WORDS, YES_WORDS) if censored else (YES_WORDS, NO_WORDS)
        if value in (0, 1):
            return str(int(value != censored))
        if word in (*EVENT_WORDS, *yes):
            return "1"
        if word in (*CENSORED_WORDS, *no):
            return "0"
        hint = "is it the column of the times?" if value is not None else "correct the row."
        self.lines.append(
            f"{heading} must say 1 or 0 ({'1: censored' if censored else '1: the event came'}), got {text!r} "
            f"({row.place}). HINT: {hint}"
        )
        return ""


def read_columns(path: str | Path, required: Sequence[str], source: str) -> Table:
    """A table with these columns.

    Raises:
        ManifestError: one is missing; names what is there.
    """
    table = read_table_file(path)
    missing = [name for name in required if name not in table.headings]
    if missing:
        hint = "--from names the project whose table this is"
        if {"Event", "Status"} <= set(table.headings):
            hint = (
                "in ABMILX's tables Event is the time in months, and Status says whether the event came: train on them "
                "with --time_column Event --event_column Status"
            )
        raise ManifestError(
            source,
            [f"must have the columns {', '.join(required)}, got {', '.join(table.headings)} ({path}). HINT: {hint}."],
        )
    if not table.rows:
        raise ManifestError(source, [f"must hold at least one slide, got none ({path}). HINT: fetch the file anew."])
    return table


def by_lists(cohort: ProjectCohort, asked: Asked, problems: Problems, *, patients: bool) -> tuple[ProjectCohort, ...]:
    """The cohort once per file of lists, with its split; as it is where none is asked for.

    Where a file has no test, what it calls val is what papers report, and is the test here.

    Args:
        cohort: all slides.
        asked: the options; `split` is a file with the columns train, val and perhaps test, or a folder of such files.
        problems: those of the cohort, raised here together with the files'.
        patients: whether the lists are of patients, else of slides.

    Raises:
        ManifestError: anything is wrong.
    """
    problems.check()
    if asked.split is None:
        return (cohort,)
    path = Path(asked.split)
    files = find_folds(path) if path.is_dir() else (path,)
    key = "patient_id" if patients else "slide_id"
    folds = []
    for file in files:
        place_of = _read_lists(file, problems, names={row[key] for row in cohort.rows}, patients=patients)
        left = list(dict.fromkeys(row[key] for row in cohort.rows if row[key] not in place_of))
        if left and not asked.keep_listed:
            problems.lines += [
                f"{key[:-3]} must be in the split, got {name!r} in none of it ({file}). HINT: --keep_listed drops it."
                for name in left
            ]
        elif left:
            logger.info("%s: %d %ss that it does not name are left out", file, len(left), key[:-3])
        rows = tuple({**row, "split": place_of[row[key]]} for row in cohort.rows if row[key] in place_of)
        folds.append(replace(cohort, rows=rows))
    problems.check()
    return tuple(folds)


def _read_lists(file: Path, problems: Problems, *, names: Iterable[str], patients: bool) -> dict[str, str]:
    """Name -> split."""
    headings, rows = read_delimited(file)
    lists = [name for name in LISTS if name in headings]
    if not {"train", "val"} <= set(lists):
        problems.lines.append(
            f"a split must have the columns train and val, got {', '.join(headings)} ({file}). HINT: give the "
            "project's splits_0.csv, or its folder."
        )
        return {}
    if "test" not in lists:
        logger.info("%s: it has no test; val, which such papers report, is the test split", file)
    all_names, place_of = set(names), dict[str, str]()
    for heading in lists:
        split = "test" if heading == "val" and "test" not in lists else str(split_of(heading))
        for row in rows:
            name = row[heading] if patients else slide_name(row[heading])
            if row[heading].casefold() in NOT_THERE:
                continue
            row_place = f"{file.name}, row {row.line}"
            if name not in all_names:
                problems.lines.append(
                    f"{'patient' if patients else 'slide'} of the split must be in the table, got {name!r} "
                    f"({row_place}). HINT: is it the split of this cohort?"
                )
            if place_of.setdefault(name, split) != split:
                problems.lines.append(
                    f"{name!r} must be in one list, got it in several ({row_place}). HINT: take one out."
                )
    return place_of
