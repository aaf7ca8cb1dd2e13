"""Starts the ranks of a run by fork from a process that has imported all, and watches them until a deadline.

A rank is a process of its own, with its own signals, exit and output, as a launcher's; only the imports are shared.
Unlike torchrun, which kills the rest when a rank fails, it lets every rank come to its own end.
"""

import atexit
import ctypes
import faulthandler
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch

from ds_wsi.engines.machine.cpu import free_port
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.processes import end_with_parent, is_stopped, state_of

from .case import Shot
from .engines import variables_of
from .injector import arm

_PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
GONE_S = 15.0  # that what a run started may outlive it
LOOK_S = 0.02


@dataclass
class Ended:
    """How the ranks of a run ended.

    Attributes:
        codes: exit statuses, negative for a signal; None: it had to be killed.
        printed: what each rank printed.
        seconds: time on the clock.
        left: processes that outlived all ranks.
    """

    codes: list[int | None]
    printed: list[str]
    seconds: float
    left: list[str]

    @property
    def hung(self) -> bool:
        """Whether a rank did not end by itself."""
        return None in self.codes

    @property
    def words(self) -> str:
        """All that was printed."""
        return "\n".join(self.printed)


def adopt_orphans() -> None:
    """Whatever the ranks leave becomes this process's child, and is found."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@dataclass
class Started:
    """The ranks of a run, at work."""

    pids: list[int]
    logs: list[Path]
    began: float


def start(
    words: Sequence[str],
    engine: str,
    ranks: int,
    logs: Path,
    *,
    shots: Sequence[Shot] = (),
    variables: dict[str, str] | None = None,
    file_bytes: int | None = None,
    modules_to: Path | None = None,
) -> Started:
    """Fork the ranks of a command of `ds-wsi`.

    Args:
        words: the command line after the program.
        engine: a key of `ENGINES`.
        ranks: processes.
        logs: a folder for what they print.
        shots: the faults that hit them.
        variables: the environment's, beside the launcher's.
        file_bytes: the largest file that they may write.
        modules_to: a file in which rank 0 lists the modules that it has at its end.
    """
    logs.mkdir(parents=True, exist_ok=True)
    port, pids, paths = free_port(), [], []
    for rank in range(ranks):
        path = logs / f"{len(list(logs.iterdir())):03}-rank{rank}.log"
        path.touch()
        paths.append(path)
        environment = {**variables_of(engine, rank, ranks, port), **(variables or {})}
        pids.append(fork(partial(_rank, words, environment, shots, rank, file_bytes, modules_to), path))
    return Started(pids, paths, time.monotonic())


def _rank(
    words: Sequence[str],
    variables: dict[str, str],
    shots: Sequence[Shot],
    rank: int,
    file_bytes: int | None,
    modules_to: Path | None,
) -> int:
    from ds_wsi.cli import main
    from ds_wsi.evaluation import validator

    validator.CONTEXT = multiprocessing.get_context("fork")  # spawned, it would import all anew
    torch.set_num_threads(1)  # torch mends its pool after a fork: here, because several threads at once would race
    os.environ.update(variables)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    arm(shots, rank)
    code = main(words)
    if modules_to is not None and rank == 0:
        modules_to.write_text(json.dumps(sorted(sys.modules)))
    return code


def fork(function: Callable[[], int], log: Path) -> int:
    """The pid of a child that prints to `log`, and ends as a script of its own would, with what it returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # says where a rank hangs
    end_with_parent()  # a campaign that is killed leaves nothing at work
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):  # what started the campaign may ignore some
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        # Of its own, for what started the campaign may catch what is printed.
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        logger.handlers.clear()
        try:
            code = function()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(
    run: Started,
    timeout_s: float,
    *,
    stays: Sequence[int] = (),
    goes_on_after_s: float | None = None,
    beside: Sequence[int] = (),
) -> Ended:
    """Wait until all ranks have ended; what runs at the deadline is killed.

    Args:
        run: what `start` returned.
        timeout_s: the deadline, from the start of the run.
        stays: ranks that a fault holds for ever: killed, as by their launcher, when the others have ended.
        goes_on_after_s: a rank that is seen stopped is told to go on after so long.
        beside: processes of another run, which may live on.
    """
    codes: dict[int, int | None] = {}
    held = {run.pids[rank] for rank in stays}
    stopped: dict[int, float] = {}
    while len(codes) < len(run.pids):
        for pid in [pid for pid in run.pids if pid not in codes]:
            reaped, status = os.waitpid(pid, os.WNOHANG)
            if reaped:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif goes_on_after_s is not None and is_stopped(state_of(pid)):
                since = stopped.setdefault(pid, time.monotonic())
                if time.monotonic() - since > goes_on_after_s:
                    os.kill(pid, signal.SIGCONT)
        open_ = [pid for pid in run.pids if pid not in codes]
        if time.monotonic() - run.began > timeout_s or (open_ and held.issuperset(open_) and held != set(run.pids)):
            for pid in open_:
                if pid not in held:
                    os.kill(pid, signal.SIGUSR2)
                    time.sleep(0.5)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[pid] = -signal.SIGKILL if pid in held and held.issuperset(open_) else None
        time.sleep(LOOK_S)
    seconds = time.monotonic() - run.began
    printed = [path.read_text(errors="replace") for path in run.logs]
    return Ended([codes[pid] for pid in run.pids], printed, seconds, _left(beside))


def _left(beside: Sequence[int]) -> list[str]:
    """Processes that are still there some time after; killed then."""
    until = time.monotonic() + GONE_S
    while (rest := _children(beside)) and time.monotonic() < until:
        time.sleep(0.1)
    words = []
    for child in rest:
        with suppress(psutil.Error):
            words.append(f"{child.pid} {child.name()} {child.status()}")
            child.kill()
    return words


def _children(beside: Sequence[int]) -> list[psutil.Process]:
    children = []
    for child in psutil.Process().children(recursive=True):
        if child.pid in beside:
            continue
        with suppress(psutil.Error):
            if child.status() != psutil.STATUS_ZOMBIE:
                children.append(child)
            elif child.ppid() == os.getpid():
                with suppress(ChildProcessError):
                    os.waitpid(child.pid, os.WNOHANG)
    return children
