"""What a command prints of an error, and its exit status: one rule for all commands.

[Note: whose error] Where an error was raised says whose it is:

    a `raise` of this package's           the user's: our sentence, as it is
    OSError, anyone's                     the machine's (a full disk, a permission): its words and its path
    ValueError of a library               of a value that we passed on: its words, with the slides and the place of ours
    anything else                         a fault of this package: the traceback, and where to report it

The first three end with status 2, the last with 1. `DS_WSI_TRACEBACK=1` shows every traceback.
"""

import dis
import errno
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from ds_wsi.runtime.log import logger

USER_ERROR = 2
SHOW_ALL = "DS_WSI_TRACEBACK"
_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
_OF_OURS = (ValueError, RuntimeError, OSError)  # what we raise for users; an assertion is no such
_REMEDIES = {
    errno.ENOSPC: "free space there, or name another folder; the same command goes on where it can",
    errno.EDQUOT: "free space within the quota, or name another folder; the same command goes on where it can",
    errno.EACCES: "the folder or file must be yours to read and write",
    errno.EPERM: "the folder or file must be yours to read and write",
    errno.EROFS: "name a folder that can be written to",
    errno.EMFILE: "raise the limit of open files: ulimit -n 4096",
    errno.ENOENT: "check the path",
}
_IN_WORKER = re.compile(r"^Caught (\w+) in .*? worker process \d+\.\s*Original Traceback", re.DOTALL)


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Add to every error that leaves the block what it was about, such as "slide S-001"."""
    try:
        yield
    except Exception as error:
        error.add_note(place)
        raise


def report(error: Exception) -> int:
    """Print an error as [Note: whose error] says; returns the exit status.

    Raises:
        Exception: the error, where it is a fault, with a note where to report it: Python prints both.
    """
    words = _words(error)
    if words is None:
        error.add_note(
            "This is a fault of ds_wsi, not of what it was given. HINT: report it in the project's issue tracker, with "
            "the command, the lines above and what `ds-wsi --version` prints."
        )
        raise error
    if os.environ.get(SHOW_ALL):
        logger.error("%s", "".join(traceback.format_exception(error)).rstrip())
    logger.error("%s", words)
    return USER_ERROR


def is_ours(error: BaseException) -> bool:
    """Whether a `raise` statement of this package raised it, here or in a worker process of torch's."""
    if not isinstance(error, _OF_OURS) or isinstance(error, NotImplementedError):
        return False
    if _IN_WORKER.match(str(error)):
        return _worker_line(str(error)) is not None
    last = _innermost(error.__traceback__)
    if last is None or not _is_package(last.tb_frame.f_code.co_filename):
        return False
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def _words(error: Exception) -> str | None:
    """What the user is told; None: the error is a fault."""
    notes = ", ".join(getattr(error, "__notes__", ()))
    about = f" ({notes})" if notes else ""
    if is_ours(error):
        if _IN_WORKER.match(str(error)):
            return f"{_worker_line(str(error))}{about}"
        return str(error) + ("" if all(note in str(error) for note in getattr(error, "__notes__", ())) else about)
    if isinstance(error, OSError):
        paths = " -> ".join(str(path) for path in (error.filename, error.filename2) if path is not None)
        remedy = _REMEDIES.get(error.errno or 0)
        words = f"{error.strerror or error}{f': {paths}' if paths else ''}{about}{_place(error)}"
        return words + (f". HINT: {remedy}." if remedy else "")
    if isinstance(error, ValueError) and not _IN_WORKER.match(str(error)):
        return f"{error}{about}{_place(error)}. HINT: {SHOW_ALL}=1 shows where it came from."
    return None


def _place(error: BaseException) -> str:
    """The innermost line of this package's that the error passed."""
    where, at = "", error.__traceback__
    while at is not None:
        name = at.tb_frame.f_code.co_filename
        if _is_package(name):
            where = f" [ds_wsi/{os.path.relpath(name, _PACKAGE)}:{at.tb_lineno}]"
        at = at.tb_next
    return where


def _innermost(at: TracebackType | None) -> TracebackType | None:
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at


def _is_package(filename: str) -> bool:
    return os.path.realpath(filename).startswith(_PACKAGE)


def _worker_line(text: str) -> str | None:
    """Our sentence in what torch says of a worker's error, whose traceback it has as text; None: it is not ours."""
    lines = text.splitlines()
    frames = [number for number, line in enumerate(lines) if line.lstrip().startswith('File "')]
    if not frames:
        return None
    last = frames[-1]
    filename = lines[last].split('"')[1]
    if not _is_package(filename) or not (lines[last + 1 : last + 2] or [""])[0].lstrip().startswith("raise"):
        return None
    after = [line for line in lines[last + 2 :] if line.strip() and not line.startswith(" ")]
    return "\n".join(after).partition(": ")[2] or None
