"""One at a time: a file that says who works on something, and is locked for as long as that process lives.

The lock is the system's (POSIX record locks), which ends with the process however it dies, and holds between machines
on network file systems that have locks. So no lock is ever stale: a file that a killed process left is taken over.

[Note: a lock's file is opened once] The system lets a process's lock go when the process closes any descriptor of the
file, whichever it was locked by. So what this process holds is answered from memory, and its file is not opened again.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

from ds_wsi.runtime.files import read_json
from ds_wsi.runtime.full_disk import naming_full_disk
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.temporary import is_temporary

T = TypeVar("T")
R = TypeVar("R")
NAME = re.compile(r"\.ds_wsi-[0-9a-f]{32}\.lock")
PROGRAM = "ds_wsi"
WAIT_S = 0.5
_WITHOUT = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: dict[Path, str] = {}  # what this process holds, to which its own locks do not show -> what it signed
_told: set[Path] = set()


class HeldError(ValueError):
    """Another process works on it; the message names it."""


def lock_path(folder: Path, name: str = "") -> Path:
    """The lock of a folder, or of what has this name in it."""
    return folder / f".ds_wsi-{hashlib.sha256(name.encode()).hexdigest()[:32]}.lock"


def is_lock(path: Path) -> bool:
    """Whether a name is one that `lock_path` gives."""
    return NAME.fullmatch(path.name) is not None


def is_of_work(path: Path) -> bool:
    """Whether a name is one that this program gives for the time of its work: of a lock, or of a temporary folder."""
    return is_lock(path) or is_temporary(path)


@contextmanager
def only_one(folder: Path, what: str, remedy: str) -> Iterator[None]:
    """Hold the lock of a folder, which is there, in the block.

    Args:
        folder: a folder that must not be worked in twice.
        what: the option or thing that it is, for the error.
        remedy: what the error advises.

    Raises:
        HeldError: another process holds it; says which, on which machine and since when.
    """
    path = lock_path(folder)
    lock = take(path)
    if lock is None:
        raise HeldError(f"{what} must not be in use, got {folder}, in which {holder(path)} works. HINT: {remedy}.")
    try:
        yield
    finally:
        release(path, lock)


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Hold a lock in the block, after all who hold it before."""
    while (lock := take(path)) is None:
        time.sleep(WAIT_S)
    try:
        yield
    finally:
        release(path, lock)


def take(path: Path) -> int | None:
    """Lock this file, which is made; None where another process, or this one, holds it.

    Where the file system has no locks the file is taken, with one warning per folder.

    Raises:
        OSError: the folder is missing or cannot be written to, or the file is a symbolic link.
    """
    path, mark = _resolved(path), _record()
    if _held.setdefault(path, mark) is not mark:  # in one operation: of two threads one takes it
        return None
    try:
        descriptor = _locked(path)
        if descriptor is None:
            del _held[path]
            return None
        try:
            with naming_full_disk(path.parent):
                _sign(descriptor, mark)
        except BaseException:
            _let_go(path, descriptor)
            raise
    except BaseException:
        del _held[path]
        raise
    return descriptor


def _locked(path: Path) -> int | None:
    """A descriptor of the file, locked and still the one of that name; None where another process holds it."""
    while True:
        with naming_full_disk(path.parent):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _WITHOUT:
                os.close(descriptor)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return None
                raise
            if path.parent not in _told:
                _told.add(path.parent)
                logger.warning(
                    "%s: its file system has no locks (%s); start no second command there", path.parent, error.strerror
                )
        if _is_still_there(path, descriptor):
            return descriptor
        os.close(descriptor)  # the one that held it has removed it: the next file of the name is another


def release(path: Path, lock: int) -> None:
    """Give a lock back that `take` gave, and remove its file."""
    path = _resolved(path)
    try:
        _let_go(path, lock)
    finally:
        _held.pop(path, None)  # last: see [Note: a lock's file is opened once]


def _let_go(path: Path, descriptor: int) -> None:
    with suppress(OSError):
        os.unlink(path)
    os.close(descriptor)


def _resolved(path: Path) -> Path:
    """The one name of a lock in this process, however its folder is spelt; the file itself may be a link, to refuse."""
    return path.parent.resolve() / path.name


def remove_dead_locks(folder: Path) -> None:
    """Remove the files of locks that nobody holds: a process that was killed after its last write leaves one."""
    for path in folder.glob(".ds_wsi-*.lock"):
        if is_lock(path) and (lock := take(path)) is not None:
            release(path, lock)


def holder(path: Path) -> str:
    """Who holds a lock, in words."""
    try:
        signed = _held.get(_resolved(path))  # see [Note: a lock's file is opened once]
        record = read_json(path, "a lock") if signed is None else json.loads(signed)
        here = " on this machine" if record["host"] == socket.gethostname() else f" on {record['host']}"
        return f"process {record['pid']}{here} ({record['command']}, since {record['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def shared_map(
    items: Sequence[T], path_of: Callable[[T], Path | None], work: Callable[[T], R], workers: int
) -> list[R]:
    """What `work` returns of each item, done by threads that hold the item's lock; None needs none.

    Several processes that are given the same items take different ones: those that another works on come last, when
    it has let them go, and `work` finds what it left. A thread waits for a lock only while it holds none, so that
    processes do not wait for each other in a circle; those of a process that died are free.
    """

    def locked(item: T, *, waits: bool) -> R | _Later:
        path = path_of(item)
        if path is None:
            return work(item)
        while (lock := take(path)) is None:
            if not waits:
                return _Later()
            time.sleep(WAIT_S)
        try:
            return work(item)
        finally:
            release(path, lock)

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        results: list[Any] = list(pool.map(lambda item: locked(item, waits=False), items))
        later = [index for index, result in enumerate(results) if isinstance(result, _Later)]
        if later:
            logger.info(
                "%s works on %d of %d slides: they come last",
                *(holder(path_of(items[later[0]]) or Path()), len(later), len(items)),
            )
        for index, result in zip(later, pool.map(lambda index: locked(items[index], waits=True), later), strict=True):
            results[index] = result
    return results


class _Later:
    """Another process works on the item."""


_NONE = _Later()


class Claims(Generic[T]):
    """Items that several processes share, each held from `free` until `give_back`; all are let go at the block's end.

    Args:
        items: the items, in order.
        path_of: an item's lock, in a folder that is there.

    Attributes:
        left: the items that were not given back.
    """

    def __init__(self, items: Sequence[T], path_of: Callable[[T], Path]) -> None:
        self.left = list(items)
        self._path_of = path_of
        self._locks: dict[T, int] = {}
        self._told = False

    def __enter__(self) -> "Claims[T]":
        return self

    def __exit__(self, *exception: object) -> None:
        for item, lock in self._locks.items():
            release(self._path_of(item), lock)
        self._locks.clear()

    def free(self) -> Iterator[T]:
        """The items that are left and that nobody holds, each held when it is yielded."""
        for item in tuple(self.left):
            if item not in self._locks and (lock := take(self._path_of(item))) is not None:
                self._locks[item] = lock
                yield item

    def give_back(self, item: T) -> None:
        """The item is done."""
        release(self._path_of(item), self._locks.pop(item))
        self.left.remove(item)

    def wait(self) -> None:
        """Wait before another look at the items that others hold; holds none, so that none waits for this process."""
        assert not self._locks, "another process may wait for what is held"
        if not self._told:
            self._told = True
            logger.info("%s works on the last %d slides: waiting", holder(self._path_of(self.left[0])), len(self.left))
        time.sleep(WAIT_S)


def shared_stream(
    items: Sequence[T],
    path_of: Callable[[T], Path],
    found: Callable[[T], R | None],
    work: Callable[[Iterator[T]], Iterator[tuple[T, R]]],
) -> Generator[R, None, None]:
    """What `work` yields of the items, as `shared_map` does, for work that reads items ahead.

    Args:
        items: the items, in the order in which they are wanted; the lock of each is held from when `work` asks for it
            until it has yielded it.
        path_of: an item's lock, in a folder that is there.
        found: what another process has left of an item that is held now; None: nothing.
        work: takes items and yields each with its result, whose files are then there.

    Yields:
        Each item's result, those that others left when they are found.
    """
    with Claims(items, path_of) as claims:
        others: list[R] = []

        def undone() -> Iterator[T]:
            for item in claims.free():
                result = found(item)
                if result is None:
                    yield item
                else:
                    others.append(result)
                    claims.give_back(item)

        while claims.left:
            order = undone()
            first = next(order, _NONE)
            if not isinstance(first, _Later):
                for item, result in work(chain([first], order)):
                    claims.give_back(item)
                    yield result
            yield from others
            others.clear()
            if isinstance(first, _Later) and claims.left:
                claims.wait()


def _is_still_there(path: Path, descriptor: int) -> bool:
    try:
        by_path = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    by_descriptor = os.fstat(descriptor)
    return (by_path.st_dev, by_path.st_ino) == (by_descriptor.st_dev, by_descriptor.st_ino)


def _record() -> str:
    """Who this process is, for those that find its lock."""
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]]).strip() or PROGRAM
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since, "command": command})


def _sign(descriptor: int, record: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, record.encode(), 0)


os.register_at_fork(after_in_child=_held.clear)  # the parent holds them, and the system says so
