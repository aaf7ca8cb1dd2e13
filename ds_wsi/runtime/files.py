"""Files that are either whole or absent: written beside their final name, synced, then renamed."""

import errno
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from ds_wsi.runtime.full_disk import naming_full_disk
from ds_wsi.runtime.temporary import temporary_folder, usual_mode


@contextmanager
def atomic_path(path: str | os.PathLike[str], n_bytes: int | None = None) -> Iterator[Path]:
    """Yield a temporary path of the same name in a folder beside; move it to `path` when the block ends well.

    A process killed inside the block leaves `path` as it was. A symbolic link at `path` is replaced, not followed. The
    file's permissions are those that the umask leaves, whatever its writer chose: some keep a file to its owner.

    Args:
        path: where the file is written.
        n_bytes: the file's size, where it is known.

    Raises:
        DiskFullError: there is no room for it; names the folder.
    """
    final = Path(path)
    with naming_full_disk(final.parent, n_bytes):
        final.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(final.parent, n_bytes) as folder:
        temporary = folder / final.name
        yield temporary
        temporary.chmod(usual_mode(folder))
        sync_file(temporary)
        os.replace(temporary, final)
        sync_directory(final.parent)


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries (the names) to the disk."""
    sync_file(path)


def link_or_copy(source: Path, target: Path) -> None:
    """Give `source`, a file that is never changed in place, another name, atomically; a copy where it cannot have two.

    Not every file system has hard links.
    """
    with atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically; a byte of a name that is no UTF-8 is escaped."""
    content = text.encode(errors="backslashreplace")
    with atomic_path(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically; NaN and infinity are refused, JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Read a regular file; a pipe or a device, which may never begin or never end, is an error.

    Raises:
        ValueError: it is no file; names it.
        OSError: it is missing, a folder, or not readable.
    """
    with open_file(path) as file:
        return file.read()


def open_file(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file to read, without waiting: see `read_file`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer would wait
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            raise ValueError(f"{os.fspath(path)} must be a file, got a pipe or a device")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_file(path: str | os.PathLike[str]) -> None:
    """Refuse what `read_file` refuses, for a library that opens the file itself."""
    open_file(path).close()


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """Read a JSON file as `json.loads` has it.

    Args:
        path: the file.
        what: what it is, for the error.

    Raises:
        ValueError: it is no file, or no JSON in UTF-8; names it.
        OSError: it is missing, or not readable.
    """
    content = read_file(path)
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} must be JSON in UTF-8, got {error} ({os.fspath(path)})") from error


def read_object(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """Read a JSON file that holds an object: see `read_json`."""
    content = read_json(path, what)
    if not isinstance(content, dict):
        raise ValueError(f"{what} must be a JSON object, got {type(content).__name__} ({os.fspath(path)})")
    return content


def json_number(value: float) -> float | None:
    """None for NaN, which JSON has not."""
    return None if math.isnan(value) else value
