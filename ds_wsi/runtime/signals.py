"""Signals that ask a command to end: SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (Slurm's warning), SIGHUP (a closed terminal).

Where nothing would be lost a command ends at once, by an exception that no `except Exception` takes for an error.
Inside `deferring` it goes on to a place where its work can be kept, asks `asked()` there, and ends then. A second
Ctrl-C leaves at once, whatever the process waits for: a thread reads the signals too, because Python's own handlers
wait until the main thread is back from a library's call.

Launchers and Slurm send the signals to all of a job's processes: those that a command forks ignore them, but SIGTERM.
"""

import atexit
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from ds_wsi.runtime.log import logger
from ds_wsi.runtime.processes import command_of, parent_of

STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SAME_PRESS_S = 1.0  # a terminal and a launcher can both pass one Ctrl-C on
_LOOK_S = 1.0
_TEARDOWN_S = 30.0  # of a process that has ended but for what libraries take down
_LAUNCHED = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")


class Stopped(BaseException):
    """The command was asked to end and has ended; nothing is lost, and the same command goes on.

    Args:
        reason: what asked, such as "SIGTERM".
        together: whether all ranks end at the same place.
    """

    def __init__(self, reason: str, *, together: bool = False) -> None:
        super().__init__(f"stopped by {reason}")
        self.reason, self.together = reason, together


def _launchers() -> list[tuple[int, int]]:
    """(child, parent) of the processes that started this one as a rank: a parent that is killed is missed by it.

    `accelerate launch` of one process passes nothing on to it. `deepspeed` starts a program that starts the ranks, and
    passes nothing on to that.
    """
    if not any(name in os.environ for name in _LAUNCHED):
        return []
    parent = os.getppid()
    ancestors = [(os.getpid(), parent)]
    above = parent_of(parent)
    if "deepspeed.launcher.launch" in command_of(parent) and "deepspeed" in command_of(above):
        ancestors.append((parent, above))
    return ancestors


class _Watch:
    """What has been asked of this process."""

    def __init__(self) -> None:
        self.reason = ""
        self.deferred = 0
        self.over_since = 0.0
        self._first_press = 0.0
        self._told = False
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="ds_wsi-signals", daemon=True)
        self._before: dict[int, object] = {}

    def start(self) -> None:
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background job, means it
                self._before[number] = signal.signal(number, self._handle)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether what was watched has ended, and only the process has not."""
        return self.over_since > 0

    def end(self) -> None:
        """Put the handlers back that were there before; of a watch that is over, ignore the signals from now on."""
        self._close({number: signal.SIG_IGN for number in self._before} if self.is_over else self._before)

    def give_back(self) -> None:
        """End, of a watch that is over in a process that goes on after all (a notebook's `%run`)."""
        atexit.unregister(self.end)
        self._close(self._before)

    def _close(self, handlers: Mapping[int, Any]) -> None:
        """Have these handlers from now on, and look no more."""
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._ended.set()
        with suppress(OSError):
            self._write.send(b"\0")
        self._thread.join(2 * _LOOK_S)
        self._read.close()
        self._write.close()

    def forget_in_child(self) -> None:
        """A forked process has none of this: it ends with its parent."""
        with suppress(ValueError):  # forked by a thread: no handler can be set there
            signal.set_wakeup_fd(-1)
            for number in self._before:
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
        for end in (self._read, self._write):
            end.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_over:
            return
        name = signal.Signals(number).name
        self.reason = self.reason or name
        if not self.deferred:
            raise Stopped(name)

    def _look(self) -> None:
        launchers = _launchers()
        while not self._ended.is_set():
            ready, _, _ = select.select([self._read], [], [], _LOOK_S)
            for number in self._read.recv(64) if ready else b"":
                if number in self._before:
                    self._hear(number)
            if any(parent_of(child) != parent for child, parent in launchers):
                launchers = []
                if self.is_over:  # what is left of the process holds a GPU for nobody
                    os._exit(128 + signal.SIGTERM)
                logger.warning("the launcher is gone: taken as SIGTERM")
                os.kill(os.getpid(), signal.SIGTERM)

    def _hear(self, number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if number == signal.SIGINT:
            if self._first_press and now - self._first_press > SAME_PRESS_S:
                self._leave()
            self._first_press = self._first_press or now
        if number == signal.SIGTERM and self.is_over and now - self.over_since > _TEARDOWN_S:
            os._exit(128 + signal.SIGTERM)
        if self.deferred and not self._told:
            self._told = True
            logger.warning("%s: what has been done is kept first; Ctrl-C leaves without", name)

    def _leave(self) -> None:
        lost = "" if self.is_over else ", what was done since the last checkpoint is lost"
        logger.warning("a second SIGINT: left at once%s", lost)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(128 + signal.SIGINT)


_watch: _Watch | None = None


@contextmanager
def heeding_signals(*, to_the_end: bool = False) -> Iterator[None]:
    """Let the signals raise `Stopped` in the block. Nothing in another thread than the main one, or inside of another.

    Args:
        to_the_end: whether the process ends after the block: the signals then change its exit status no more, but that
            a second Ctrl-C still leaves at once, until Python takes the process down.

    Raises:
        Stopped: the process was asked to end, and nothing defers it.
    """
    global _watch
    if _watch is not None and _watch.is_over and threading.current_thread() is threading.main_thread():
        _watch.give_back()
        _watch = None
    if _watch is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _watch = _Watch()
    _watch.start()
    to_the_end = to_the_end and not _is_interactive()
    if to_the_end:
        atexit.register(_watch.end)  # now: it runs after what libraries register
    try:
        yield
    finally:
        if to_the_end:
            _watch.over_since = time.monotonic()
        else:
            _watch.end()
            _watch = None


def _is_interactive() -> bool:
    """Whether somebody goes on typing in this process: an interpreter's prompt, IPython or a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    return hasattr(sys, "ps1") or bool(sys.flags.interactive) or shell() is not None


def stop_where_asked() -> None:
    """Raise what a signal has raised already, where that did not come through.

    Raises:
        Stopped: see `heeding_signals`.
    """
    if _watch is not None and _watch.reason and not _watch.deferred:
        raise Stopped(_watch.reason)


@contextmanager
def deferring() -> Iterator[None]:
    """Signals are only noted in the block: it looks at `asked` where it can end without a loss."""
    watch = _watch
    if watch is None:
        yield
        return
    watch.deferred += 1
    try:
        yield
    finally:
        watch.deferred -= 1


def asked() -> str:
    """What has asked this process to end, such as "SIGTERM", inside `deferring`; empty where nothing has."""
    return _watch.reason if _watch is not None and _watch.deferred else ""


def _in_child() -> None:
    global _watch
    if _watch is not None:
        _watch.forget_in_child()
        _watch = None


os.register_at_fork(after_in_child=_in_child)
