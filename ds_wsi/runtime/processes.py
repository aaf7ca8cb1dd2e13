"""What another process of this machine does, as Linux tells it."""

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

GONE = "?"
SAFE_PATH = "PYTHONSAFEPATH"
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_PF_FORKNOEXEC = 0x40  # of linux/sched.h
_WORDS = {
    "T": "it is stopped (SIGSTOP, or a debugger)",
    "t": "it is stopped (a debugger)",
    "D": "it waits for a disk or the network",
    "R": "it computes",
    "S": "it waits (for a file, a lock or the network)",
}


def parent_of(pid: int) -> int:
    """The process that another one belongs to; 0 where nothing is told."""
    with suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def command_of(pid: int) -> str:
    """The command line of a process; empty where nothing is told."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def state_of(pid: int | None) -> str:
    """The letter of /proc for what a process does; `GONE` where there is none, a zombie's too, or nothing is told."""
    with suppress(OSError, IndexError):
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return GONE if letter in "ZX" else letter
    return GONE


def is_forked() -> bool:
    """Whether this process goes on with the program of the one that forked it; False where nothing is told."""
    with suppress(OSError, IndexError, ValueError):
        return bool(int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6]) & _PF_FORKNOEXEC)
    return False


def is_stopped(state: str) -> bool:
    """Whether it goes on when it is told to (SIGCONT)."""
    return state in ("T", "t")


def state_words(state: str) -> str:
    """A state in words, after "got none: "."""
    return _WORDS.get(state, "it is gone" if state == GONE else "it lives")


def end_with_parent() -> None:
    """Have Linux kill this process when the thread that started it ends: stopped, too, or in a read that never ends."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


@contextmanager
def from_own_path() -> Iterator[None]:
    """Python processes that are started in the block import nothing from the present folder, which may be a stranger's.

    A fresh interpreter looks there first, and multiprocessing starts one: a file `socket.py` there would be run.
    """
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SAFE_PATH]
        else:
            os.environ[SAFE_PATH] = before


def end_words(code: int | None) -> str:
    """An exit code, negative where a signal ended the process, in words."""
    if code is None or code >= 0:
        return f"exit status {code}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
