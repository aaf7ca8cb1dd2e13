"""Small disks: a tmpfs in a mount namespace of this process's own, which ends with it."""

import ctypes
import os
from pathlib import Path

from .case import NotRunError

_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_PRIVATE, _MS_REMOUNT = 0x4000, 0x40000, 0x20
_ENOUGH = 2**30


def small_disk(folder: Path, n_bytes: int) -> None:
    """Put an empty disk of this size at a folder, for this process and those that it starts.

    Raises:
        NotRunError: the machine does not let it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) or libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None):
        raise NotRunError(f"no mount namespace here: {os.strerror(ctypes.get_errno())}")
    _mount(folder, n_bytes, 0)


def grow(folder: Path) -> None:
    """Give the disk at a folder more room than a run needs."""
    _mount(folder, _ENOUGH, _MS_REMOUNT)


def _mount(folder: Path, n_bytes: int, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, f"size={n_bytes}".encode()):
        raise NotRunError(f"no tmpfs of {n_bytes} bytes here: {os.strerror(ctypes.get_errno())}")
