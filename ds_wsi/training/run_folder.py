"""A run's folder: new, empty, or its own; what marks it, and the files that are kept there as the run goes."""

import errno
import logging
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from ds_wsi.evaluation.record import MARK_NAME as PROTOCOL_MARK
from ds_wsi.runtime.files import read_json, write_json, write_text
from ds_wsi.runtime.locks import is_of_work, only_one
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.signals import Stopped
from ds_wsi.runtime.temporary import remove_left_behind
from ds_wsi.training.checkpoint import FILE_LIST, list_checkpoints

MARK = "started.json"  # written before anything else: the folder is a run's from its first second on
FORMAT, VERSION = "ds_wsi.started", 1
LOG = "train.log"
SUBFOLDERS = ("tiles", "heatmaps")  # of the files that a run writes


def is_run_folder(path: Path) -> bool:
    """Whether training, or a protocol, began a run there; an earlier version's is known by a checkpoint."""
    if _format_of(path / MARK) == FORMAT or is_protocol_mark(path / PROTOCOL_MARK):
        return True
    return any((checkpoint / FILE_LIST).is_file() for checkpoint in list_checkpoints(path))


def is_protocol_mark(path: Path) -> bool:
    """Whether a file, no link, is one that a protocol marks a run's folder with."""
    return any(name.startswith(("data.", "model.", "optim.", "run.")) for name in _read(path))


def require_run_folder(path: Path, *, resumes: bool) -> None:
    """Refuse a folder with files in it that is no run's, and one of a run that is not to be resumed.

    Raises:
        ValueError: names some of what is there.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        escaped = str(path).encode(errors="backslashreplace").decode()
        hint = "HINT: another name, or PYTHONUTF8=1."
        raise ValueError(f"--output_dir must be of UTF-8, got {escaped}. {hint}") from error
    if not resumes and (checkpoints := list_checkpoints(path)):
        raise ValueError(
            f"--output_dir must be a new folder, got {path}, which holds {checkpoints[0].name}. "
            "HINT: add --resume_from_checkpoint to go on with that run, or give another folder."
        )
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"--output_dir must be a folder, got {path}, a file. HINT: give a new folder.")
    names = sorted(entry.name for entry in path.iterdir() if not is_of_work(entry))
    if names and not is_run_folder(path):
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ValueError(
            f"--output_dir must be a new folder, an empty one or a run's own, got {path}, which holds {len(names)} "
            f"other {'entry' if len(names) == 1 else 'entries'} ({shown}). HINT: give a new folder, such as "
            f"{path / 'run'}."
        )


def begin(path: Path) -> None:
    """Make the folder, mark it, and remove what a killed process of the program left there under temporary names."""
    path.mkdir(parents=True, exist_ok=True)
    for folder in (path, *(path / name for name in SUBFOLDERS)):
        remove_left_behind(folder)
    if _format_of(path / MARK) != FORMAT:
        write_json(path / MARK, {"format": FORMAT, "version": VERSION})


def alone_in(path: Path) -> AbstractContextManager[None]:
    """Hold a run's folder: the same command a second time, here or on another machine, is refused.

    Raises:
        HeldError: another process trains there; names it.
    """
    return only_one(path, "--output_dir", "wait for its end, or give another folder")


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append the program's messages to the folder's train.log too, as they come; after what earlier starts wrote there.

    A file of that name that the program did not begin, or a symbolic link, is left alone, with a warning.
    """
    head = f"# {FORMAT}: what the run said\n"
    log = path / LOG
    try:
        if not os.path.lexists(log):
            write_text(log, head)
        if not stat.S_ISREG(os.lstat(log).st_mode):  # of a pipe no line would ever come
            raise OSError(errno.EINVAL, "it is no file")
        descriptor = os.open(log, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        logger.warning("%s is not written: %s", log, error.strerror)
        yield
        return
    with _closing(os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace")) as file:
        if file.readline() != head:
            logger.warning("%s is not written: the file that is there is not this program's", log)
            yield
            return
        handler = _LogFile(file, log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
        logger.addHandler(handler)
        try:
            yield
        except Stopped:
            raise  # as it was asked to: the message says so
        except BaseException as error:
            record = logger.makeRecord(
                logger.name, logging.ERROR, __file__, 0, "ended by %s: %s", (type(error).__name__, error), None
            )
            handler.handle(record)
            raise
        finally:
            logger.removeHandler(handler)


class _LogFile(logging.StreamHandler):
    """Gives up, with one warning, where the disk is full: the run has more to lose than its log."""

    def __init__(self, file: TextIO, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Called by logging inside of the `except`."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        logger.removeHandler(self)
        logger.warning("%s is no longer written: %s", self.path, error.strerror)


@contextmanager
def _closing(file: TextIO) -> Iterator[TextIO]:
    """Close a file whose last lines may have no room."""
    try:
        yield file
    finally:
        with suppress(OSError):
            file.close()


def _format_of(path: Path) -> object:
    return _read(path).get("format")


def _read(path: Path) -> dict[str, Any]:
    """The object of a JSON file that is there, whole, and no link; else an empty one."""
    if path.is_symlink() or not path.is_file():
        return {}
    try:
        content = read_json(path, path.name)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
