"""What the readers share: label tables whose rows know their place, and cohorts built while problems are collected."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ds_wsi.bags.delimited import read_delimited, read_utf8
from ds_wsi.bags.manifest import Manifest, ManifestError, SlideEntry, patient_problems
from ds_wsi.bags.tables.labels import sorted_labels, spelling_problems
from ds_wsi.bags.tables.names import is_slide_id, slide_name
from ds_wsi.bags.tables.values import says_missing


@dataclass(frozen=True)
class LabelRow:
    """One row of a label file: its values by column name, and where it is ("train.csv, row 3").

    In a file with `decimal_comma` 0,25 is a number.
    """

    values: Mapping[str, str]
    place: str
    decimal_comma: bool = False

    def __getitem__(self, name: str) -> str:
        return self.values.get(name, "")


def has_column(path: str | Path, headings: Sequence[str]) -> bool:
    """Whether a label file has a column of one of these headings; False where there is no file."""
    path = Path(path)
    return path.is_file() and any(heading in headings for heading in read_delimited(path)[0])


def read_table(path: str | Path, columns: Mapping[str, Sequence[str]], required: Sequence[str]) -> list[LabelRow]:
    """Read a CSV or TSV of labels.

    Args:
        path: the file.
        columns: name of a value -> the headings under which distributors give it, the first that is there is taken.
        required: names without which the file cannot be used.

    Raises:
        ManifestError: no such file, no rows, or a required column is missing.
        ValueError: see `read_delimited`.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(
            f"labels {path}", [f"labels must be a file, got none ({path}). HINT: give the dataset's own label file."]
        )
    headings, lines = read_delimited(path)
    heading_of = {
        name: next((heading for heading in candidates if heading in headings), None)
        for name, candidates in columns.items()
    }
    problems = [
        f"labels must have a column {' or '.join(columns[name])}, got {', '.join(headings) or 'nothing'} "
        f"({path.name}). HINT: give the dataset's own label file."
        for name in required
        if heading_of[name] is None
    ]
    if problems:
        raise ManifestError(f"labels {path}", problems)
    rows = [
        LabelRow(
            {name: line[heading] for name, heading in heading_of.items() if heading is not None},
            f"{path.name}, row {line.line}",
            line.decimal_comma,
        )
        for line in lines
    ]
    if not rows:
        raise ManifestError(
            f"labels {path}", [f"labels must hold at least one row, got none ({path.name}). HINT: fetch the file anew."]
        )
    return rows


def read_names(path: str | Path, columns: Sequence[str]) -> list[tuple[str, str]]:
    """(slide name, place) of a list of slides: a CSV with one of the columns, or a text file with one name per line."""
    path = Path(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        return [(slide_name(row["name"]), row.place) for row in read_table(path, {"name": columns}, ["name"])]
    if not path.is_file():
        raise ManifestError(
            f"list {path}", [f"list of slides must be a file, got none ({path}). HINT: check its path."]
        )
    lines = read_utf8(path).splitlines()
    return [(slide_name(line.strip()), f"{path.name}, row {n}") for n, line in enumerate(lines, 1) if line.strip()]


def classes_in(rows: Iterable[LabelRow]) -> tuple[str, ...]:
    """The labels found, sorted, numbers by value; a word for none (NA, unknown) is no class."""
    return sorted_labels(row["label"] for row in rows if not says_missing(row["label"]))


def require_folder(root: str | Path, one_of: Sequence[str], dataset: str) -> Path:
    """`root`, where it holds one of the dataset's folders: else every slide would be listed as missing.

    Raises:
        ManifestError: it holds none.
    """
    root = Path(root)
    if any((root / name).is_dir() for name in one_of):
        return root
    present = sorted(path.name for path in root.iterdir())[:5] if root.is_dir() else []
    raise ManifestError(
        f"{dataset} in {root}",
        [
            f"{dataset}'s folder must hold {' or '.join(one_of)}, got {', '.join(present) or 'nothing'} ({root}). "
            "HINT: give the folder into which the dataset was unpacked."
        ],
    )


@dataclass
class CohortBuilder:
    """Slides and problems as a label file is read; `finish` raises them all at once.

    Args:
        source: names the cohort in errors.
        classes: class names in the order of the logits.
    """

    source: str
    classes: tuple[str, ...]
    problems: list[str] = field(default_factory=list)
    slides: list[SlideEntry] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)

    def require(self, row: LabelRow, name: str, value: str, allowed: Iterable[str], hint: str) -> bool:
        """Whether the value is one of those allowed; a problem is noted where it is not."""
        choices = tuple(allowed)
        if value in choices:
            return True
        self.problems.append(f"{name} must be one of {', '.join(choices)}, got {value!r} ({row.place}). HINT: {hint}.")
        return False

    def check_label(self, row: LabelRow, slide_id: str) -> None:
        """Note a row without a label, or with a word that says so."""
        label = row["label"]
        if not label or says_missing(label):
            self.problems.append(
                f"label must be given, got {repr(label) if label else 'none'} (slide {slide_id}, {row.place}). "
                "HINT: fill it in, or take the row out."
            )

    def check_spellings(self, rows: Iterable[LabelRow]) -> None:
        """Note each class that the rows spell in several ways."""
        self.problems += spelling_problems([row["label"] for row in rows])

    def add(
        self,
        row: LabelRow,
        slide_id: str,
        candidates: Sequence[Path],
        label: str,
        *,
        patient_id: str = "",
        split: str | None = None,
        mpp: float | None = None,
        center: str | None = None,
    ) -> None:
        """Add a slide, or note what is wrong with it.

        Args:
            row: the row of the label file.
            slide_id: a second one of the name is a problem.
            candidates: where its image can lie, its suffix in capitals too; the first that is there is taken.
            label: a class, or anything else where `require` has noted it.
            patient_id: the slide's own id where left out.
            split, mpp, center: see `SlideEntry`.
        """
        if not is_slide_id(slide_id):
            self.problems.append(
                f"slide's name must be non-empty and fit for a file name, got {slide_id!r} ({row.place}). "
                "HINT: correct the row."
            )
            return
        if slide_id in self.places:
            self.problems.append(
                f"slide's name must be in one row, got {slide_id!r} in {self.places[slide_id]} and {row.place}. "
                "HINT: take one of the rows out."
            )
            return
        self.places[slide_id] = row.place
        in_capitals = [path.with_suffix(path.suffix.upper()) for path in candidates]
        path = next((path for path in (*candidates, *in_capitals) if path.is_file()), None)
        if path is None:
            tried = ", ".join(str(path) for path in candidates) or "the folder"
            self.problems.append(
                f"image must be a file, got none at {tried} (slide {slide_id}, {row.place}). "
                "HINT: fetch it, or take the row out of the label file."
            )
            return
        index = self.classes.index(label) if label in self.classes else -1
        self.slides.append(SlideEntry(slide_id, path, index, patient_id or slide_id, split, mpp, center))

    def finish(self) -> Manifest:
        """The manifest.

        Raises:
            ManifestError: everything that was noted, and patients in several splits.
        """
        hint = "HINT: correct the patient, or move the slides to one side."
        split = [slide for slide in self.slides if slide.split]
        problems = self.problems + [f"{problem}. {hint}" for problem in patient_problems(split)]
        if not problems and len({slide.label for slide in self.slides}) < 2:
            labels = ", ".join(sorted({self.classes[slide.class_index] for slide in self.slides})) or "none"
            problems.append(f"labels must take at least two values, got {labels}. HINT: give the whole label file.")
        if problems:
            raise ManifestError(self.source, problems)
        return Manifest(tuple(self.slides), self.classes, self.source)
