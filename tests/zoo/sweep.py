"""The zoo's command: every model in a process of its own, results in a JSON lines file that a second run goes on with.

python -m tests.zoo.sweep [--only PATTERN] [--axis batch|spatial] [--modes lean,keep] [--timeout 120]
python -m tests.zoo.sweep --table        # docs/modules.md from the results there are
"""

import argparse
import contextlib
import fnmatch
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch
from torch import nn

from ds_wsi.partition.policy import AXES, MODES

from .entry import ZooModel
from .measure import Case, Outcome, failure, measure, quiet, reference
from .models import MODELS
from .table import read_results, write_table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "runs" / "zoo.jsonl"
SETTINGS = ("train", "eval", "draws")
FEW = ("lean", "recompute")  # modes of the settings beside training
PATIENCE = 6  # seconds of the clock for each of CPU: machines are shared
MEMORY_GIB = 10

Message = tuple[str, Outcome | None]


def cases(model: ZooModel, axes: Iterable[str], modes: Iterable[str], settings: Iterable[str]) -> Iterator[Case]:
    """What is compared of one model; cases that share a plain module follow each other."""
    modes = tuple(modes)
    for axis in axes:
        if axis == "spatial" and model.image is None:
            continue
        for setting in settings:
            some = modes if setting == "train" else tuple(mode for mode in modes if mode in FEW)
            for mode in some if axis == "batch" or setting == "train" else ():
                yield Case(model.key, axis, mode, train=setting != "eval", draws=setting == "draws")


def run_cases(
    model: ZooModel, wanted: list[Case], pipe: multiprocessing.connection.Connection, timeout: float, memory: int
) -> None:
    """Run in the model's own process: each case's outcome, told as it is known."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    torch.set_num_threads(1)
    with quiet():
        for (axis, train, draws), group in groupby(wanted, key=lambda case: case.setting):
            some = list(group)
            pipe.send((some[0].key, None))
            try:
                plain = reference(model, axis, train=train, draws=draws)
            except Exception as error:
                outcome = failure(error)
                for case in some:
                    pipe.send((case.key, Outcome("not run", f"the plain module: {outcome.detail}")))
                continue
            for case in some:
                pipe.send((case.key, None))
                if draws and not plain.draws:
                    pipe.send((case.key, Outcome("not run", "nothing is drawn", norms=plain.norms)))
                else:
                    pipe.send((case.key, measure(plain, axis, case.mode, timeout)))


def supervise(model: ZooModel, wanted: list[Case], timeout: float, memory: int) -> Iterator[tuple[Case, Outcome]]:
    """Outcomes of one model's cases; where a process dies or takes too long, another takes the rest."""
    left = {case.key: case for case in wanted}
    while left:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")  # the libraries are imported once
        process = context.Process(target=run_cases, args=(model, list(left.values()), sender, timeout, memory))
        process.start()
        sender.close()
        present = next(iter(left))
        for key, outcome in _listen(process, receiver, present, timeout):
            yield left.pop(key), outcome
        receiver.close()


def _listen(
    process: multiprocessing.process.BaseProcess,
    pipe: multiprocessing.connection.Connection,
    present: str,
    timeout: float,
) -> Iterator[tuple[str, Outcome]]:
    child = psutil.Process(process.pid)
    used, started = 0.0, time.monotonic()
    try:
        while True:
            if pipe.poll(0.2):
                try:
                    present, outcome = pipe.recv()
                except EOFError:
                    break
                if outcome is not None:
                    yield present, outcome
                    present = ""
                used, started = _cpu_seconds(child), time.monotonic()
            elif _cpu_seconds(child) - used > timeout or time.monotonic() - started > PATIENCE * timeout:
                os.kill(process.pid or 0, signal.SIGKILL)
                process.join()
                if present:
                    yield present, Outcome("timed out", f"after {timeout:.0f} s of CPU", seconds=timeout)
                return
    finally:
        process.join()
    if process.exitcode and present:
        yield present, Outcome("crashed", f"the process died, exit code {process.exitcode}")


def _cpu_seconds(child: psutil.Process) -> float:
    try:
        times = child.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


def warm_up(models: list[ZooModel]) -> None:
    """What every model's process would import for itself: libraries load parts of themselves at their first use."""
    for library in {model.key.split("/")[0] for model in models}:
        some = [model for model in models if model.key.startswith(f"{library}/")]
        for model in some if library == "transformers" else some[:1]:
            with torch.device("meta"), contextlib.suppress(Exception):
                model.build(False)  # one that fails is measured, and its failure told, in its own process
    smallest = ZooModel("own/net", lambda draws: nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)), (3, 2, 2))
    measure(reference(smallest, "batch", train=True, draws=False), "batch", "lean")


def commit() -> str:
    """The commit of the working tree, with a plus sign where files of the package differ."""
    run = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()  # noqa: E731
    return run("rev-parse", "--short", "HEAD") + ("+" if run("status", "--porcelain", "ds_wsi") else "")


def sweep(models: list[ZooModel], arguments: argparse.Namespace, done: set[str], version: str) -> None:
    """Measure what is not there yet, model after model; a line a case."""
    memory = int(arguments.memory_gib * 2**30)
    for index, model in enumerate(models):
        due = [case for case in cases(model, arguments.axis, arguments.modes, arguments.settings)]
        due = [case for case in due if case.key not in done]
        for case, outcome in supervise(model, due, arguments.timeout, memory):
            line = {**asdict(case), **asdict(outcome), "commit": version, "torch": torch.__version__}
            with arguments.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            told = (
                f"error {outcome.error:.1e} noise {outcome.noise:.1e}" if outcome.status == "exact" else outcome.detail
            )
            sys.stdout.write(f"{index + 1}/{len(models)} {case.key}: {outcome.status} {told}\n")
            sys.stdout.flush()


def main(words: list[str] | None = None) -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = lambda allowed: lambda text: [_one_of(word, allowed) for word in text.split(",")]  # noqa: E731
    parser.add_argument("--only", default="*", help="models whose key holds this, or matches it: timm/*, *vit*")
    parser.add_argument("--axis", type=listed(AXES), default=list(AXES))
    parser.add_argument("--modes", type=listed(MODES), default=list(MODES))
    parser.add_argument("--settings", type=listed(SETTINGS), default=list(SETTINGS), help="train,eval,draws")
    parser.add_argument("--timeout", type=float, default=120, help="seconds of CPU a case")
    parser.add_argument("--memory_gib", type=float, default=MEMORY_GIB)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--again", default="", help="measure these outcomes anew: wrong,crashed; or all")
    parser.add_argument("--table", action="store_true", help="write docs/modules.md and measure nothing")
    arguments = parser.parse_args(words)
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        pattern = arguments.only if any(sign in arguments.only for sign in "*?[") else f"*{arguments.only}*"
        models = [model for model in MODELS.values() if fnmatch.fnmatch(model.key, pattern)]
        if not models:
            raise SystemExit(f"--only must match a model, got {arguments.only!r}")
        again = arguments.again.split(",")
        results = read_results(arguments.results)
        done = {key for key, line in results.items() if "all" not in again and line.outcome.status not in again}
        version = commit()
        with quiet():
            warm_up(models)
        parts = [models[first :: arguments.workers] for first in range(arguments.workers)]
        context = multiprocessing.get_context("fork")
        workers = [context.Process(target=sweep, args=(part, arguments, done, version)) for part in parts[1:]]
        for worker in workers:
            worker.start()
        sweep(parts[0], arguments, done, version)
        for worker in workers:
            worker.join()
    write_table(arguments.results, ROOT / "docs" / "modules.md")


def _one_of(word: str, allowed: Iterable[str]) -> str:
    if word not in allowed:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(allowed)}, got {word!r}")
    return word


if __name__ == "__main__":
    main()
