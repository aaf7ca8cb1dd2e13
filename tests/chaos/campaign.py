"""The campaign's command: each case in a process of its own; a second run goes on with its lines of results.

python -m tests.chaos.campaign [--only PATTERN] [--sample] [--timeout 240] [--minutes 60]
python -m tests.chaos.campaign --table        # the table of the results there are; --page writes it to docs/stops.md
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import fnmatch
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch

from ds_wsi.runtime.errors import SHOW_ALL

from .case import FELL, LOST, NOT_RUN, Case, NotRunError, Outcome
from .cases import CASES
from .drills import DRILLS
from .launch import adopt_orphans, fork, start, wait
from .table import Line, markdown, read_results, write_line, write_table
from .yard import DROPOUT, Yard

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "runs" / "chaos.jsonl"
TIMEOUT_S = 240.0
RUNS_A_CASE = 6  # at most, each with the timeout
_ENGINES = (("plain", 1), ("zero2", 2), ("fsdp2", 2))  # that import something of their own


def warm_up(root: Path) -> None:
    """Import what runs import as they go: learnt from runs in children, so that this process has run nothing."""
    torch.set_num_threads(1)
    import_module("ds_wsi.training.loop")
    import_module("ds_wsi.training.dry_run")
    for engine, ranks in _ENGINES:
        folder = root / "warm" / engine
        yard = Yard(root, folder, TIMEOUT_S)
        yard.logs.mkdir(parents=True)
        words = yard.words(yard.run, engine, *DROPOUT, "--num_train_epochs", "1")
        listed = folder / "modules.json"
        ended = wait(start(words, engine, ranks, yard.logs, modules_to=listed), TIMEOUT_S)
        if set(ended.codes) != {0}:
            raise RuntimeError(f"a run without a fault must end with 0, got {ended.codes}: {ended.words[-3000:]}")
        for name in json.loads(listed.read_text()):
            if name not in sys.modules:
                try:
                    import_module(name)
                except Exception:  # a part that is made as it goes
                    continue


def attempt(case: Case, root: Path, timeout_s: float) -> Outcome:
    """One case, in a process of its own; its folder is kept where it fell."""
    folder = Path(tempfile.mkdtemp(prefix="case-", dir=root))
    yard, outcome_file = Yard(root, folder, timeout_s), folder / "outcome.json"
    began = time.monotonic()
    pid = fork(lambda: _case_process(case, yard, outcome_file), folder / "case.log")
    code = _await(pid, RUNS_A_CASE * timeout_s)
    outcome = Outcome(FELL, [LOST], f"the case's process ended with {code}: {(folder / 'case.log').read_text()[-600:]}")
    if outcome_file.is_file():
        outcome = Outcome(**json.loads(outcome_file.read_text()))
    outcome.seconds = round(time.monotonic() - began, 1)
    if outcome.status == FELL:
        outcome.detail += f" [{folder}]"
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def _case_process(case: Case, yard: Yard, outcome_file: Path) -> int:
    os.setsid()
    adopt_orphans()
    os.environ.pop(SHOW_ALL, None)
    try:
        outcome = DRILLS[case.fault](case, yard)
    except NotRunError as error:
        outcome = Outcome(NOT_RUN, detail=str(error))
    except Exception as error:
        traceback.print_exc()
        outcome = Outcome(FELL, [LOST], f"{type(error).__name__}: {error}")
    outcome_file.write_text(json.dumps(asdict(outcome)))
    return 0


def _await(pid: int, timeout_s: float) -> int | None:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        reaped, status = os.waitpid(pid, os.WNOHANG)
        if reaped:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def commit() -> str:
    """The commit of the working tree, with a plus sign where files of the package differ."""
    run = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()  # noqa: E731
    return run("rev-parse", "--short", "HEAD") + ("+" if run("status", "--porcelain", "ds_wsi") else "")


def campaign(cases: list[Case], results: Path, timeout_s: float, minutes: float, *, warm: bool = True) -> list[Line]:
    """Try what is not there yet, case after case; a line a case."""
    version, lines = commit(), []
    until = time.monotonic() + 60 * minutes if minutes else float("inf")
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    if warm:
        warm_up(root)
    for number, case in enumerate(cases, 1):
        if time.monotonic() > until:
            break
        outcome = attempt(case, root, timeout_s)
        line = Line(case.fault, case.engine, case.ranks, str(case.at), case.rank, outcome, version)
        write_line(results, line)
        lines.append(line)
        words = f"{', '.join(outcome.ways)} {outcome.detail}" if outcome.ways else outcome.detail
        sys.stdout.write(f"{number}/{len(cases)} {case.key}: {outcome.status} {outcome.seconds:.0f} s {words[:1500]}\n")
        sys.stdout.flush()
    if all(line.outcome.status != FELL for line in lines):
        shutil.rmtree(root, ignore_errors=True)
    return lines


def main(words: list[str] | None = None) -> int:
    """See the module's text; the exit status is 1 where a case fell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="cases whose key holds this, or matches it: kill/*, *zero3*")
    parser.add_argument("--sample", action="store_true", help="a few cases, of each kind one")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds of the clock a run")
    parser.add_argument("--minutes", type=float, default=0, help="begin no case after these (default: no end)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--again", default="", help="try these outcomes anew: fell,not run; or all")
    parser.add_argument("--table", action="store_true", help="print the table and try nothing")
    parser.add_argument("--page", action="store_true", help="write docs/stops.md's table and try nothing")
    arguments = parser.parse_args(words)
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    if not (arguments.table or arguments.page):
        pattern = arguments.only if any(sign in arguments.only for sign in "*?[") else f"*{arguments.only}*"
        cases = [case for case in CASES if fnmatch.fnmatchcase(case.key, pattern)]
        cases = [case for case in cases if case.sample or not arguments.sample]
        if not cases:
            raise SystemExit(f"--only must match a case, got {arguments.only!r}")
        again = arguments.again.split(",")
        results = read_results(arguments.results)
        done = {key for key, line in results.items() if "all" not in again and line.outcome.status not in again}
        cases = [case for case in cases if case.key not in done]
        campaign(cases, arguments.results, arguments.timeout, arguments.minutes)
    if arguments.page:
        write_table(arguments.results, ROOT / "docs" / "stops.md")
    lines = read_results(arguments.results)
    sys.stdout.write(markdown(lines.values()))
    return int(any(line.outcome.status == FELL for line in lines.values()))


if __name__ == "__main__":
    sys.exit(main())
