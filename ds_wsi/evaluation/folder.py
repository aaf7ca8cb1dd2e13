"""An evaluation's folder: it may be new, hold other files, or an earlier evaluation of the very same."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_wsi.evaluation.parts import FOLDER as PARTS
from ds_wsi.evaluation.record import FILE_NAME as RECORD
from ds_wsi.evaluation.record import RESULTS
from ds_wsi.evaluation.results import REPORT
from ds_wsi.runtime.files import read_json, write_json

MARK = "evaluation.json"
FORMAT, VERSION = "ds_wsi.evaluation", 1
NAMES = (*RESULTS, REPORT, RECORD, "heatmaps", PARTS, MARK)  # that an evaluation writes
OF_MODELS = ("config.json", "model.safetensors")
HINT = "HINT: give a new folder."


def require_no_run(folder: Path, is_run: bool) -> None:
    """Refuse the folder of a run or of an exported model.

    Raises:
        ValueError: it is one.
    """
    if is_run or any(os.path.lexists(folder / name) for name in OF_MODELS):
        raise ValueError(
            "--output_dir must not be the folder of a run or a model, whose results would be written over, got "
            f"{folder}. HINT: give a new folder, such as {folder / 'evaluation'}."
        )


def require_same_evaluation(folder: Path, made_of: Mapping[str, Any]) -> None:
    """Refuse a folder with results of something else, or of nobody knows what.

    Args:
        folder: the results' folder.
        made_of: name -> value of what this evaluation is made of, as JSON has it; names that the earlier one did not
            record, and names that are not known yet, are not compared.

    Raises:
        ValueError: names what differs, or the files that are in the way.
    """
    present = [name for name in NAMES if os.path.lexists(folder / name)]
    if not present:
        return
    recorded = _read(folder / MARK)
    if recorded is None:
        raise ValueError(
            f"--output_dir must not hold other files under the names of an evaluation's, got {', '.join(present)} "
            f"without a whole {MARK} ({folder}). {HINT}"
        )
    lines = [
        f"{name} {recorded[name]}, now {value}"
        for name, value in made_of.items()
        if name in recorded and recorded[name] != value
    ]
    if lines:
        raise ValueError(
            f"--output_dir must not hold an evaluation of something else, got one with {'; '.join(lines)} ({folder}). "
            f"{HINT}"
        )


def mark(folder: Path, made_of: Mapping[str, Any], summary: str = "") -> None:
    """Write what the results that follow are made of, and what the summary of all slides is known by, once it is there.

    Nothing where they are marked so already: another process may have written the summary meanwhile.
    """
    if summary or _read(folder / MARK) != made_of:
        about = {"summary": summary} if summary else {}
        write_json(folder / MARK, {"format": FORMAT, "version": VERSION, "made_of": dict(made_of), **about})


def summary_of(folder: Path) -> str:
    """What the summary in the folder is known by; empty: it is not written, or by an earlier version."""
    return str(_values(folder / MARK).get("summary", ""))


def _read(path: Path) -> dict[str, Any] | None:
    made_of = _values(path).get("made_of")
    return made_of if isinstance(made_of, dict) else None


def _values(path: Path) -> dict[str, Any]:
    if path.is_symlink() or not path.is_file():
        return {}
    try:
        values = read_json(path, MARK)
    except ValueError:
        return {}
    if not isinstance(values, dict) or (values.get("format"), values.get("version")) != (FORMAT, VERSION):
        return {}
    return values
