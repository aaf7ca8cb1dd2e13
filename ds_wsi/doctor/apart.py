"""A function in processes of its own, with a time limit: a hang or a crash there is an error here.

The ranks of a call share an empty folder, in which each of them works: gloo and NCCL meet at a file in it (`STORE`),
and it is removed at the end. What they print goes to files there, of which an error tells the end.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ds_wsi.doctor.finding import FAIL, Finding, worst
from ds_wsi.runtime.errors import SHOW_ALL
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.processes import end_with_parent

STORE = "store"
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from ds_wsi.doctor.apart import main; main()"
_LOOK_S = 0.05
# Of a launcher that started this process, and of an engine in it: the processes below are no part of theirs.
_LAUNCHERS = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "MASTER_", "OMPI_", "PMI", "SLURM_", "GROUP_", "ROLE_")


class ApartError(RuntimeError):
    """A function's processes did not all answer; says which one, and why."""


def apart(function: Callable[..., Any], *arguments: Any, n_ranks: int = 1, timeout_s: float) -> list[Any]:
    """What `function(*arguments)` returns in each of `n_ranks` fresh processes, by rank.

    Args:
        function: a module's function, found there by its name.
        arguments: values that JSON can hold, as what it returns.
        n_ranks: processes; each has RANK, WORLD_SIZE and LOCAL_RANK as a launcher sets them.
        timeout_s: the time after which all are killed.

    Raises:
        ApartError: a process failed, crashed or gave no answer in time. No process outlives this.
    """
    order = json.dumps([function.__module__, function.__qualname__, list(arguments)])
    with tempfile.TemporaryDirectory(prefix="ds_wsi-doctor-") as name, contextlib.ExitStack() as scope:
        folder = Path(name)
        ranks = []
        for rank in range(n_ranks):
            log = scope.enter_context((folder / f"{rank}.log").open("wb"))
            command = [sys.executable, "-X", "faulthandler", "-c", _START, json.dumps(sys.path), order]
            # A session of its own: what it starts, such as a compiler, is killed with it.
            process = subprocess.Popen(
                *(command,), cwd=folder, env=_environment(rank, n_ranks), stdout=log, stderr=log, start_new_session=True
            )
            scope.callback(_end, process)
            ranks.append(process)
        _wait(ranks, timeout_s)
        return _answers(folder, [process.poll() for process in ranks], timeout_s)


def finding_apart(
    function: Callable[..., Any], *arguments: Any, n_ranks: int = 1, timeout_s: float, remedy: str
) -> Finding:
    """The worst finding of a function that returns one, in processes of its own; FAIL where one gives none.

    Args:
        function, arguments, n_ranks, timeout_s: see `apart`.
        remedy: what to do where the function gives none.
    """
    try:
        findings = [Finding(*one) for one in apart(function, *arguments, n_ranks=n_ranks, timeout_s=timeout_s)]
    except ApartError as error:
        return Finding(FAIL, str(error), remedy)
    return worst(findings)


def _wait(ranks: Sequence[subprocess.Popen], timeout_s: float) -> None:
    """Wait until all have ended, one has failed, or the time is over."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        states = [process.poll() for process in ranks]
        if None not in states or any(states):
            return
        time.sleep(_LOOK_S)


def _answers(folder: Path, states: Sequence[int | None], timeout_s: float) -> list[Any]:
    answers = [folder / f"{rank}.json" for rank in range(len(states))]
    if all(path.is_file() for path in answers) and not any(states):
        return [json.loads(path.read_text()) for path in answers]
    # The earliest is the cause, the others lost their peer.
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    crashed = [rank for rank, state in enumerate(states) if state]
    late = [rank for rank, state in enumerate(states) if state is None]
    rank = int(errors[0].stem) if errors else crashed[0] if crashed else late[0] if late else 0
    log = (folder / f"{rank}.log").read_text(errors="replace")
    if errors:
        words = errors[0].read_text()
    elif crashed:
        words = _end_words(states[rank] or 0, log)
    else:
        words = f"no answer within {timeout_s:g} s"
    if os.environ.get(SHOW_ALL):
        logger.error("%s", log.rstrip())
    raise ApartError(words if len(states) == 1 else f"rank {rank} of {len(states)}: {words}")


def _end_words(status: int, log: str) -> str:
    if status < 0:
        return f"the process died of {signal.Signals(-status).name}"
    lines = [line for line in log.splitlines() if line.strip()]
    return f"the process ended with status {status}" + (f": {lines[-1].strip()[:300]}" if lines else "")


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(rank: int, n_ranks: int) -> Mapping[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_ranks, "LOCAL_WORLD_SIZE": n_ranks}
    # As torchrun sets it: ranks with a thread per core each would be in each other's way.
    return kept | {
        name: str(number) for name, number in (numbers | {"LOCAL_SIZE": n_ranks, "OMP_NUM_THREADS": 1}).items()
    }


def main() -> None:
    """Call the function, write its answer and end the fresh process."""
    end_with_parent()
    module, name, arguments = json.loads(sys.argv[2])
    rank = os.environ["RANK"]
    try:
        function: Any = import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        answer = json.dumps(function(*arguments))
        Path(f"{rank}.new").write_text(answer)
        os.replace(f"{rank}.new", f"{rank}.json")
    except BaseException as error:
        traceback.print_exc()
        lines = str(error).splitlines() or [""]
        Path(f"{rank}.error").write_text(f"{type(error).__name__}: {lines[0][:400]}")
        raise SystemExit(1) from error
    sys.stdout.flush()
    sys.stderr.flush()
    # The answer stands. An interpreter that is torn down can meet a thread of gloo's that lets go of a tensor, and dies
    # of SIGABRT: on a busy machine a finding that was right was lost to it.
    os._exit(0)
