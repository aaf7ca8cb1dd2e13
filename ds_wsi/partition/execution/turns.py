"""One operation of a store at a time, and what the garbage collector drops in the middle of one.

[Note: dropped tickets] Python runs `__del__` on whatever thread happens to collect, in the middle of whatever that is
doing: of an operation of the same store, or on the disk's thread, for which freeing a tensor's memory would wait. So
`__del__` only says that a ticket is dropped. It is released at once where no operation is under way, else when that
ends; what the disk's thread collects is released by the next operation.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from ds_wsi.partition.execution.ticket import Ticket

P = ParamSpec("P")
T = TypeVar("T")
Release = Callable[[Ticket], None]  # gives up a claim, within a turn
_barred: set[int] = set()  # threads of disks, of any store: two could wait for each other


class Turns:
    """The turns of a store's operations, and its dropped tickets: see [Note: dropped tickets].

    The store is not kept here, or its memory would wait for the garbage collector.
    """

    def __init__(self) -> None:
        self._lock, self._depth = threading.RLock(), 0
        self._dropped: deque[Ticket] = deque()

    @contextmanager
    def turn(self, release: Release) -> Iterator[None]:
        """An operation, inside; one may call others."""
        with self._lock:
            self._depth += 1
            try:
                self._catch_up(release)
                yield
                self._catch_up(release)
            finally:
                self._depth -= 1

    def drop(self, ticket: Ticket, release: Release) -> None:
        """Release a ticket, now or later; never waits for another thread's operation. For `__del__`."""
        self._dropped.append(ticket)
        if threading.get_ident() in _barred or not self._lock.acquire(blocking=False):
            return
        try:
            if self._depth == 0:
                with self.turn(release):
                    pass
        finally:
            self._lock.release()

    def bar(self) -> None:
        """Let the calling thread, which operations wait for, release nothing."""
        _barred.add(threading.get_ident())

    def _catch_up(self, release: Release) -> None:
        while self._depth == 1 and self._dropped:
            release(self._dropped.popleft())


def in_turn(operation: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """An operation of a store, which has `turns` and `give_up`, in a turn of its own."""

    @wraps(operation)
    def taken(store: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        with store.turns.turn(store.give_up):
            return operation(store, *args, **kwargs)

    return taken
