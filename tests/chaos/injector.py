"""Faults as data: armed in a process that runs the package, from outside of it, by functions that count their calls."""

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from .case import Moment, Shot

# place -> the module whose name is looked up when it is called, and the name
PLACES = {
    "prepare": ("ds_wsi.training.prepare", "cohort_of"),
    "start": ("ds_wsi.training.loop", "tell_start"),
    "step": ("ds_wsi.training.one_step", "_micro_loss"),
    "save": ("ds_wsi.training.resume", "save_checkpoint"),
    "write": ("ds_wsi.training.checkpoint", "write_tensors"),  # in the thread that writes
    "part": ("ds_wsi.training.checkpoint", "_write_part"),  # likewise, of a rank that is not the main one
    "seal": ("ds_wsi.training.checkpoint", "seal"),
    "rename": ("ds_wsi.training.checkpoint", "_make_way"),
    "delete": ("ds_wsi.training.checkpoint", "_delete_listed"),
    "remove": ("ds_wsi.training.checkpoint", "remove_checkpoint"),
    "validation": ("ds_wsi.evaluation.predict", "_aggregate"),  # a slide; the test's slides come last
    "export": ("ds_wsi.training.validation", "export"),
    "results": ("ds_wsi.training.outcome", "write_results"),
    "grid": ("ds_wsi.bags.cohort", "write_grid"),
    "pack": ("ds_wsi.bags.packing", "pack_slide"),
    "packing": ("ds_wsi.slides.tile_store", "_batch"),  # within a slide's file
    "record": ("ds_wsi.training.outcome", "run_record"),
}
SLOW_S = 8.0  # more than the silence after which a rank that does not beat is missed
HOLD_S = 120.0


class ChaosError(Exception):
    """An exception that nobody expects."""


def _segfault() -> None:
    ctypes.string_at(0)


def _deadlock() -> None:
    Path(os.environ["CHAOS_HOLD"], "held").touch()
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def _raise() -> None:
    raise ChaosError("injected")


def _to_worker(number: int) -> None:
    """Send a signal to the first process that reads, or validates, for this one."""
    for child in multiprocessing.active_children():
        os.kill(child.pid or 0, number)
        return
    raise AssertionError("there is no process of it")


def hold(folder: str) -> None:
    """Say that the moment has come, and wait until the case lets go."""
    Path(folder, "held").touch()
    until = time.monotonic() + HOLD_S
    while not Path(folder, "go").exists() and time.monotonic() < until:
        time.sleep(0.05)


def _send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": _send(signal.SIGKILL),
    "SIGTERM": _send(signal.SIGTERM),
    "SIGUSR1": _send(signal.SIGUSR1),
    "SIGINT": _send(signal.SIGINT),
    "stop": _send(signal.SIGSTOP),
    "raise": _raise,
    "segfault": _segfault,
    "deadlock": _deadlock,
    "slow": lambda: time.sleep(SLOW_S),
    "stop worker": lambda: _to_worker(signal.SIGSTOP),
    "kill worker": lambda: _to_worker(signal.SIGKILL),
    "hold": lambda: hold(os.environ["CHAOS_HOLD"]),
}


def arm(shots: Iterable[Shot], rank: int) -> None:
    """Let the shots of this rank hit this process, which is the run's own and ends with it."""
    for shot in shots:
        if shot.rank in (None, rank):
            _at_call(shot.moment, ACTIONS[shot.action])


def _at_call(moment: Moment, action: Callable[[], None]) -> None:
    module_name, name = PLACES[moment.place]
    module = import_module(module_name)
    real, calls = getattr(module, name), [0]

    @wraps(real)
    def counted(*words: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] - 1 == moment.number:
            if moment.delay_s:
                threading.Timer(moment.delay_s, action).start()
            else:
                action()
        return real(*words, **named)

    setattr(module, name, counted)
