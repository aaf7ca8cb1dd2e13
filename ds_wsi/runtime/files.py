"""Files that are either whole or absent: written beside their final name, synced, then renamed."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
    """Write `text` (UTF-8) to `path` atomically."""
    content = text.encode()
    with atomic_path(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically; NaN and infinity are refused, JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def json_number(value: float) -> float | None:
    """None for NaN, which JSON has not."""
    return None if math.isnan(value) else value
