"""Temporary names: the one place that makes them, knows them again, and removes what a killed process left.

A writer works in a folder of its own beside the final name, `.ds_wsi-<32 hex digits>.tmp`: 8 of its machine, 24 random.
`mkdir` makes it exclusively: it takes no name that is there, and follows no symbolic link. A record inside names the
folder and its writer, who holds a lock on it for as long as the process lives. A later start removes a folder only
where the name is one of ours, the record is of this very folder, and nobody holds the lock; or where it holds at most
an empty record, because a writer of this machine was killed before it signed. What has another name is never touched.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ds_wsi.runtime.full_disk import naming_full_disk

PROGRAM = "ds_wsi"
RECORD = ".ds_wsi-writer.json"
NAME = re.compile(r"\.ds_wsi-[0-9a-f]{32}\.tmp")
TRIES = 10  # of making a folder that another start does not take for left behind
OTHER_HOST_S = 24 * 3600  # another machine's lock does not show on every file system: its folders are left for a day


@contextmanager
def temporary_folder(parent: Path, n_bytes: int | None = None) -> Iterator[Path]:
    """Make a folder below `parent` that nobody else has, and remove it with all that is in it at the end.

    Args:
        parent: where the folder is made.
        n_bytes: how much will be written, where it is known: an error tells it.

    Raises:
        DiskFullError: there is no room for what the block writes.
        OSError: `parent` is missing, or cannot be written to.
    """
    with naming_full_disk(parent, n_bytes):
        folder, record = _signed_folder(parent)
    try:
        # Inside: what was written, and what is free, is looked at before the folder is removed.
        with naming_full_disk(parent, n_bytes, written=folder):
            yield folder
    finally:
        os.close(record)
        # What a network file system keeps for now, a later start removes.
        shutil.rmtree(folder, ignore_errors=True)


def usual_mode(folder: Path) -> int:
    """The permissions that a new file has below this temporary folder: those that the user's umask leaves."""
    return (folder / RECORD).stat().st_mode & 0o777


def is_temporary(path: Path) -> bool:
    """Whether a name is one that `temporary_folder` gives."""
    return NAME.fullmatch(path.name) is not None


def remove_left_behind(folder: Path) -> None:
    """Remove the temporary folders in `folder` whose writer is dead; other files, and those of writers that live, stay.

    Folders of another machine's writers are left for a day.
    """
    if not folder.is_dir():
        return
    for path in sorted(path for path in folder.iterdir() if is_temporary(path) and not path.is_symlink()):
        try:
            record = os.open(path / RECORD, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            if _is_known_to_this_host(path):
                with suppress(OSError):  # with something in it, it is not ours
                    path.rmdir()
            continue
        except OSError:  # not ours to open
            continue
        try:
            if _is_dead(record, path):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(record)


def _signed_folder(parent: Path) -> tuple[Path, int]:
    """A new folder, and the descriptor of its record, which holds the lock."""
    for _ in range(TRIES):
        folder = parent / f".ds_wsi-{_host_digits()}{secrets.token_hex(12)}.tmp"
        folder.mkdir()
        record = None
        try:
            record = _sign(folder)
        finally:
            if record is None:
                shutil.rmtree(folder, ignore_errors=True)
        if record is not None:
            return folder, record
    raise OSError(f"{parent}: a folder that is made there must stay, got {TRIES} that were gone at once")


def _sign(folder: Path) -> int | None:
    """Write the record and return its descriptor, which holds the lock; None where another start removed the folder."""
    try:
        descriptor = os.open(folder / RECORD, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return None
    text = json.dumps({"program": PROGRAM, "name": folder.name, "host": socket.gethostname(), "pid": os.getpid()})
    is_ours = False
    try:
        with suppress(OSError):  # without locks no folder with a record is ever removed: see `_is_dead`
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if (folder / RECORD).exists():
            os.write(descriptor, text.encode())
            is_ours = True
    finally:
        if not is_ours:
            os.close(descriptor)
    return descriptor if is_ours else None


def _host_digits() -> str:
    """This machine's part of a name: a folder without a record tells by it whose locks would show."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_known_to_this_host(folder: Path) -> bool:
    """Whether a writer that had not signed yet would be seen here, or cannot live after so long."""
    digits = folder.name.removeprefix(".ds_wsi-")[:8]
    with suppress(OSError):
        return digits == _host_digits() or time.time() - folder.stat().st_mtime > OTHER_HOST_S
    return False


def _is_dead(record: int, folder: Path) -> bool:
    try:
        if not stat.S_ISREG(os.fstat(record).st_mode):  # no record: a pipe would be waited for
            return False
        fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        text = os.read(record, 2**16)
        if not text:  # killed before it was written, where nothing else is there
            return os.listdir(folder) == [RECORD] and _is_known_to_this_host(folder)
        content = json.loads(text)
    except (OSError, ValueError, RecursionError):  # the writer lives, or this is no record of ours
        return False
    if not isinstance(content, dict) or (content.get("program"), content.get("name")) != (PROGRAM, folder.name):
        return False
    return content.get("host") == socket.gethostname() or time.time() - os.fstat(record).st_mtime > OTHER_HOST_S
