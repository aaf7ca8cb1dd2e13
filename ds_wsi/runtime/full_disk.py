"""A full disk, by its name: which folder, how much was needed, how much is free.

Writers of other libraries say it in words of their own ("unexpected pos 1234 vs 1200"), and none says where.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ds_wsi.runtime.units import format_bytes

FULL_BYTES = 2**20  # free at the most where a disk is full: what is left of it by a write that failed in the middle
_NUMBERS = {
    errno.ENOSPC: "a full disk",
    errno.EDQUOT: "a quota that is used up",
    errno.EFBIG: "a limit to the size of a file (ulimit -f)",
}
# What torch's, safetensors', HDF5's and Arrow's writers say where the system's number is lost.
_DISGUISES = (
    "unexpected pos",
    "PytorchStreamWriter",
    "inline_container",
    "write failed",
    "I/O error",
    "iostream error",
)


class DiskFullError(OSError):
    """What was to be written has no room; names the folder and both sizes. What was there before is as it was."""

    def __str__(self) -> str:
        return str(self.args[1])


@contextmanager
def naming_full_disk(folder: Path, n_bytes: int | None = None, written: Path | None = None) -> Iterator[None]:
    """Turn any writer's error that means a full disk into a `DiskFullError`.

    Args:
        folder: the folder that is written to, where the error does not name a file.
        n_bytes: how much is written, where it is known before.
        written: a folder that holds nothing but what was written so far.

    Raises:
        DiskFullError: in the place of the writer's error.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        number = _number(error, folder)
        if number is None:
            raise
        if isinstance(error, OSError) and isinstance(error.filename, str):
            folder = Path(error.filename).parent if written is None else folder
        # Some writers remove what they wrote before they tell.
        least = (0 if written is None else _bytes_below(written)) + (free_bytes(folder) or 0)
        needed = f"more than {format_bytes(least)}" if least else "more than is free"
        raise _error(folder, number, needed if n_bytes is None else format_bytes(n_bytes)) from error


def free_bytes(folder: Path) -> int | None:
    """Room for this user on a folder's disk; None where the system does not tell."""
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        statistics = os.statvfs(existing)
    except OSError:
        return None
    # File systems without blocks or files of their own, as of some clouds, tell 0 of 0.
    return statistics.f_bavail * statistics.f_frsize if statistics.f_blocks else None


def _error(folder: Path, number: int, needed: str) -> DiskFullError:
    free = free_bytes(folder)
    left = "" if free is None else f", {format_bytes(free)} free"
    with suppress(OSError):
        statistics = os.statvfs(folder)
        if statistics.f_files and not statistics.f_favail:
            left += " (and no room for another file's name)"
    return DiskFullError(
        number,
        f"{folder} must have room for what is written, got {_NUMBERS[number]} ({os.strerror(number)}): {needed} "
        f"needed{left}. HINT: free space there, or name another folder; what was there before is whole, and the same "
        "command goes on.",
    )


def _number(error: BaseException, folder: Path) -> int | None:
    """The system's number of a full disk, of the error or of one that it came from; None: it is another error."""
    at: BaseException | None = error
    while at is not None and not isinstance(at, (ValueError, TypeError)):  # of what was given, not of a disk
        if isinstance(at, OSError) and at.errno in _NUMBERS:
            return at.errno
        text = str(at)
        for number in _NUMBERS:
            if os.strerror(number) in text or f"errno = {number}," in text or f"os error {number})" in text:
                return number
        if any(words in text for words in _DISGUISES):
            free = free_bytes(folder)
            if free is not None and free < FULL_BYTES:
                return errno.ENOSPC
        at = at.__cause__ or at.__context__
    return None


def _bytes_below(folder: Path) -> int:
    n_bytes = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):
                n_bytes += os.lstat(os.path.join(parent, name)).st_size
    return n_bytes
