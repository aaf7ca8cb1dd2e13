"""Paths of slides in a table: where they start, and what to do about those that lead nowhere."""

import os
import re
from functools import lru_cache
from pathlib import Path

from ds_wsi.slides.readers import slide_exists

_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def path_problem(text: str, folder: Path, place: str) -> str | None:
    """What is wrong with a slide's path, and what to write; None where it is a file's.

    Args:
        text: the path as the table has it.
        folder: where relative paths start.
        place: where the cell stands, for the message.
    """
    folder = folder.absolute()  # in messages "." says nothing
    path = folder / text
    if text and slide_exists(path):
        return None
    start = f"relative paths start at the manifest's folder, {folder}"
    rule = f"path must be a file, got {text!r}, which is none under {folder} ({place})"
    if not text:
        return f"{rule}. HINT: {start}"
    if os.sep == "/" and (_DRIVE.match(text) or "\\" in text):
        return f"path must be written with /, got {text!r} ({place}). HINT: {_of_windows(text, folder)}"
    if _ELSEWHERE.match(text):
        return f"path must be a file of this machine, got {text!r} ({place}). HINT: fetch the slides first"
    if text.startswith(("~", "$")):
        return f"path must be written out, got {text!r} ({place}). HINT: write {_written_out(text)}"
    if path.is_dir():
        return f"{rule}. HINT: it is a folder without DICOM; write the slide's file in it"
    if not Path(text).is_absolute() and Path(text).is_file():
        instead = os.path.relpath(Path.cwd() / text, folder.absolute())
        return f"{rule}. HINT: {start}; in the present folder it exists: write {instead}"
    near = _other_case(path)
    if near is not None:
        return f"{rule}. HINT: there is {near.name}, of which case counts"
    return f"{rule}. HINT: {start}" if not Path(text).is_absolute() else f"{rule}. HINT: correct the path"


def _of_windows(text: str, folder: Path) -> str:
    if _DRIVE.match(text):
        return "it is a path of Windows; write where the file is on this machine"
    slashes = text.replace("\\", "/")
    return f"write {slashes}" + ("" if (folder / slashes).is_file() else f", starting at {folder}")


def _written_out(text: str) -> str:
    found = os.path.expandvars(os.path.expanduser(text))
    return found if found != text else "the whole path"


def _other_case(path: Path) -> Path | None:
    """The file whose name differs in case alone."""
    folder = path.parent
    if not folder.is_dir():
        return None
    name = _by_lower_case(folder, folder.stat().st_mtime_ns).get(path.name.lower())
    return None if name is None else folder / name


@lru_cache(maxsize=64)
def _by_lower_case(folder: Path, modified_ns: int) -> dict[str, str]:
    """The names of a folder's files by their lower case: a thousand missing slides lie in a few folders."""
    return {entry.name.lower(): entry.name for entry in folder.iterdir()}
