"""A reader per project: its tables in, one cohort per fold out. What its columns mean is known by the project."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ds_wsi.bags.manifest import ManifestError
from ds_wsi.bags.projects.cells import EVENT, LABEL, Asked, Problems, ProjectCohort, by_lists, read_columns
from ds_wsi.bags.published import find_folds
from ds_wsi.bags.tables.formats import joined
from ds_wsi.bags.tables.names import slide_name
from ds_wsi.bags.tables.read import Table, TableRow, read_table_file
from ds_wsi.bags.tables.values import split_of
from ds_wsi.runtime.files import read_file

MONTHS, DAYS = "time_months", "time_days"
_CASE, _SLIDE = "case_id", "slide_id"


def read_project(project: str, labels: str | Path, asked: Asked) -> tuple[ProjectCohort, ...]:
    """Read a project's cohort, once per fold.

    Args:
        project: a key of `PROJECTS`.
        labels: the project's table; of MMP the folder of a fold, or of all; of STAMP two tables, divided by a comma.
        asked: what the tables do not say.

    Raises:
        ManifestError: lists every problem of every row at once.
        ValueError: something is asked that this project's tables have no place for.
    """
    read, takes = PROJECTS[project]
    given = [name for name, value in vars(asked).items() if value and name not in takes]
    if given:
        option = "split_file" if given[0] == "split" else given[0]
        raise ValueError(
            f"--{option} must not be given with --from {project}, got {vars(asked)[given[0]]!r}. HINT: leave it out."
        )
    return read(labels, asked)


def _ids(row: TableRow) -> dict[str, str]:
    return {"slide_id": slide_name(row[_SLIDE]), "patient_id": row[_CASE]}


def _clam(labels: str | Path, asked: Asked) -> tuple[ProjectCohort, ...]:
    """CLAM: case_id, slide_id, label; lists of slides."""
    source = f"CLAM's table {labels}"
    table = read_columns(labels, (_CASE, _SLIDE, "label"), source)
    cohort = ProjectCohort(tuple({**_ids(row), LABEL: row["label"]} for row in table.rows))
    return by_lists(cohort, asked, Problems(source), patients=False)


def _porpoise(labels: str | Path, asked: Asked) -> tuple[ProjectCohort, ...]:
    """MCAT and PORPOISE: survival_months, and censorship, where 1 is censored; lists of patients."""
    return _followed(labels, asked, f"PORPOISE's table {labels}", "survival_months", "censorship")


def _survpath(labels: str | Path, asked: Asked) -> tuple[ProjectCohort, ...]:
    """SurvPath: as PORPOISE, of several endpoints, os without a suffix."""
    endings = {"os": "", "dss": "_dss", "pfi": "_pfi", "dfi": "_dfi"}
    ending = _of_endpoints(endings, asked, f"SurvPath's table {labels}")
    source = f"SurvPath's table {labels}"
    return _followed(labels, asked, source, f"survival_months{ending}", f"censorship{ending}")


def _followed(labels: str | Path, asked: Asked, source: str, time: str, censorship: str) -> tuple[ProjectCohort, ...]:
    table, problems = read_columns(labels, (_CASE, _SLIDE, time, censorship), source), Problems(source)
    rows = tuple(_survival(row, problems, (MONTHS, time), censorship, censored=True) for row in table.rows)
    return by_lists(ProjectCohort(rows, MONTHS), asked, problems, patients=True)


def _survival(
    row: TableRow, problems: Problems, time: tuple[str, str], event: str, *, censored: bool
) -> dict[str, str]:
    """The row with our time and event; both empty where one of them is missing.

    Args:
        row: the project's.
        problems: where a wrong cell is noted.
        time: our heading and the project's.
        event, censored: see `Problems.event`.
    """
    cells = problems.time(row, time[1]), problems.event(row, event, censored=censored)
    return {**_ids(row), **dict(zip((time[0], EVENT), cells if all(cells) else ("", ""), strict=True))}


def _mmp(labels: str | Path, asked: Asked) -> tuple[ProjectCohort, ...]:
    """MMP: a folder per fold with train.csv and test.csv; os_survival_days, and os_censorship, where 1 is censored."""
    folder, source = Path(labels), f"MMP's folder {labels}"
    endpoint = _of_endpoints({name: name for name in ("os", "dss", "pfi", "dfi")}, asked, source)
    time, censorship = f"{endpoint}_survival_days", f"{endpoint}_censorship"
    problems, cohorts = Problems(source), []
    for fold in (folder,) if (folder / "train.csv").exists() else find_folds(folder):
        rows: list[Mapping[str, str]] = []
        for name in ("train", "val", "test"):
            if name == "val" and not (fold / "val.csv").exists():
                continue
            for row in read_columns(fold / f"{name}.csv", (_CASE, _SLIDE, time, censorship), source).rows:
                placed = TableRow(row.values, f"{fold.name}/{name}.csv, {row.place}")
                cells = _survival(placed, problems, (DAYS, time), censorship, censored=True)
                rows.append({**cells, "split": str(split_of(name))})
        cohorts.append(ProjectCohort(tuple(rows), DAYS))
    problems.check()
    return tuple(cohorts)


def _of_endpoints(words: Mapping[str, str], asked: Asked, source: str) -> str:
    if asked.endpoint is None or asked.endpoint not in words:
        raise ManifestError(
            source,
            [
                f"endpoint must be one of {', '.join(words)}, because the table can hold several, got "
                f"{asked.endpoint or 'none'}. HINT: --endpoint os"
            ],
        )
    return words[asked.endpoint]


def _patho_bench(labels: str | Path, asked: Asked) -> tuple[ProjectCohort, ...]:
    """Patho-Bench: k=all.tsv with a column per fold, and config.yaml beside it, which names the task's columns."""
    path, source = Path(labels), f"Patho-Bench's table {labels}"
    config = _read_config(path.parent / "config.yaml", source)
    task, more = str(config.get("task_col", "")), [str(name) for name in config.get("extra_cols") or ()]
    time, event = f"{task}_days", f"{task}_event"
    followed = {time, event} <= set(more)
    table = read_columns(path, (_CASE, _SLIDE, *((time, event) if followed else (task,))), source)
    problems = Problems(source)
    if followed:
        rows = [_survival(row, problems, (DAYS, time), event, censored=False) for row in table.rows]
    else:
        names = {str(key): str(name) for key, name in (config.get("label_dict") or {}).items()}
        rows = [{**_ids(row), LABEL: _label(row, task, names, problems)} for row in table.rows]
    cohorts = tuple(ProjectCohort(fold, DAYS if followed else None) for fold in _folds(table, rows, problems))
    problems.check()
    return cohorts


def _read_config(path: Path, source: str) -> dict[str, Any]:
    import yaml  # here, because help pages need none

    try:
        config = yaml.safe_load(read_file(path).decode())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problem = f"config.yaml must lie beside the table, got {error} ({path}). HINT: it names the task's columns."
        raise ManifestError(source, [problem]) from error
    if not isinstance(config, dict) or "task_col" not in config:
        raise ManifestError(source, [f"config.yaml must name the task_col, got none ({path}). HINT: fetch it anew."])
    return config


def _label(row: TableRow, task: str, names: Mapping[str, str], problems: Problems) -> str:
    """The class's name, where the configuration has names."""
    text = row[task]
    if not names or text in names:
        return names.get(text, text)
    problems.lines.append(
        f"{task} must be one of config.yaml's label_dict, {', '.join(names)}, got {text!r} ({row.place}). HINT: "
        "fetch both files anew."
    )
    return text


def _folds(table: Table, rows: list[dict[str, str]], problems: Problems) -> list[tuple[Mapping[str, str], ...]]:
    """The rows once per column fold_K, without those that are in none of its splits; once where there is no fold."""
    headings = [name for name in table.headings if name.removeprefix("fold_").isdecimal() and name.startswith("fold_")]
    folds: list[tuple[Mapping[str, str], ...]] = []
    for heading in headings:
        fold = []
        for row, our_row in zip(table.rows, rows, strict=True):
            split = split_of(row[heading])
            if split is None and row[heading]:
                problems.lines.append(
                    f"{heading} must be train, val or test, got {row[heading]!r} ({row.place}). HINT: correct the row."
                )
            if split is not None:
                fold.append({**our_row, "split": split})
        folds.append(tuple(fold))
    return folds or [tuple(rows)]


def _stamp(labels: str | Path, asked: Asked) -> tuple[ProjectCohort, ...]:
    """STAMP: clini.csv (PATIENT) and slide.csv (PATIENT, FILENAME); its status says 1 or words where the event came."""
    source = f"STAMP's tables {labels}"
    parts = [Path(part.strip()) for part in str(labels).split(",")]
    if len(parts) != 2:
        raise ManifestError(source, [f"must be two tables, got {labels}. HINT: --labels clini.csv,slide.csv"])
    followed = asked.time_column is not None and asked.event_column is not None
    if followed == (asked.label_column is not None) or (asked.time_column is None) != (asked.event_column is None):
        raise ManifestError(
            source,
            [
                "--label_column, or --time_column and --event_column, must name columns of the clini table, got "
                f"{_given(asked)}. HINT: STAMP's own configuration names them: ground_truth_label, or time_label and "
                "status_label."
            ],
        )
    columns = [str(name) for name in (asked.label_column, asked.time_column, asked.event_column) if name is not None]
    clini = read_columns(parts[0], ("PATIENT", *columns), source)
    read_columns(parts[1], ("PATIENT", "FILENAME"), source)
    table = joined(clini, read_table_file(parts[1])).renamed({"PATIENT": _CASE, "FILENAME": _SLIDE})
    problems = Problems(source)
    if not followed:
        return (ProjectCohort(tuple({**_ids(row), LABEL: row[columns[0]]} for row in table.rows)),)
    time, event = columns
    rows = tuple(_survival(row, problems, ("time", time), event, censored=False) for row in table.rows)
    problems.check()
    return (ProjectCohort(rows, "time"),)


def _given(asked: Asked) -> str:
    names = ("label_column", "time_column", "event_column")
    return ", ".join(f"--{name}" for name in names if vars(asked)[name]) or "none"


# A project -> its reader, and what of `Asked` it takes.
PROJECTS: Mapping[str, tuple[Callable[[str | Path, Asked], tuple[ProjectCohort, ...]], tuple[str, ...]]] = {
    "clam": (_clam, ("split", "keep_listed")),
    "mmp": (_mmp, ("endpoint",)),
    "patho_bench": (_patho_bench, ()),
    "porpoise": (_porpoise, ("split", "keep_listed")),
    "stamp": (_stamp, ("label_column", "time_column", "event_column")),
    "survpath": (_survpath, ("split", "keep_listed", "endpoint")),
}
