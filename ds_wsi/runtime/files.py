"""Files that are either whole or absent: written beside their final name, synced, then renamed."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends without an error.

    A process killed inside the block leaves `path` as it was. The temporary name carries the process id, so that
    processes writing the same file do not share it; it is removed when the block raises.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept last: writers such as matplotlib choose the format by it.
    temporary = final.with_name(f".{final.stem}.{os.getpid()}.tmp{final.suffix}")
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, final)
        sync_directory(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


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


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically; NaN and infinity are refused, JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def json_number(value: float) -> float | None:
    """None for NaN, which JSON has not."""
    return None if math.isnan(value) else value
