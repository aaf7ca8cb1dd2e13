"""What drills share: the same command again, and what must hold of how a run ends."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

from .case import HUNG, LEFT, LOST, SILENT, Case, Outcome
from .launch import Ended, start, wait
from .yard import Strangers, Yard, check_checkpoints, check_nothing_left, differences, is_marked

STOPPED = 75
RESUMES = "--resume_from_checkpoint"
EACH_STEP = ("--save_steps", "1", "--save_total_limit", "3")


def await_file(path: Path, timeout_s: float) -> None:
    """Wait until a file is there."""
    until = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > until:
            raise RuntimeError(f"the moment did not come: {path.name} is missing")
        time.sleep(0.05)


def go_on(words: Sequence[str], case: Case, yard: Yard, outcome: Outcome, strangers: Strangers | None) -> Ended:
    """The same command again."""
    if strangers is not None and is_marked(yard.run):
        strangers.plant(yard.run)
    ended = wait(start(words, case.engine, case.ranks, yard.logs), yard.timeout_s)
    outcome.require(not ended.hung, HUNG, f"gone on with, it was killed after {ended.seconds:.0f} s")
    outcome.require(set(ended.codes) == {0}, LOST, f"gone on with: {ended.codes}: {ended.words[-600:]}")
    outcome.require(not ended.left, LEFT, f"processes: {ended.left}")
    if strangers is not None:
        strangers.check(outcome, "going on")
    return ended


def compare(outcome: Outcome, folder: Path, whole: Path) -> None:
    """The run has the uninterrupted one's results, whole checkpoints, and nothing beside."""
    differing = differences(folder, whole)
    outcome.require(not differing, LOST, f"not the uninterrupted run's: {', '.join(differing)}")
    check_checkpoints(outcome, folder, "at the end")
    check_nothing_left(outcome, folder)


def judge_refusal(outcome: Outcome, ended: Ended, says: str) -> None:
    """Each rank ended well, or with the status of a refusal, and somebody says why."""
    outcome.codes = ended.codes
    outcome.require(not ended.hung, HUNG, f"killed after {ended.seconds:.0f} s: {ended.words[-300:]}")
    outcome.require(not ended.left, LEFT, f"processes: {ended.left}")
    for number, (code, printed) in enumerate(zip(ended.codes, ended.printed, strict=True)):
        outcome.require(code in (0, 2, None), SILENT, f"rank {number} ended with {code}: {printed[-600:]}")
    if set(ended.codes) != {0}:
        outcome.require(re.search(says, ended.words), SILENT, f"nobody says {says!r}: {ended.words[-600:]}")


def must_end(words: Sequence[str], yard: Yard) -> None:
    """Run a command of which nothing is tried."""
    ended = wait(start(words, "plain", 1, yard.logs), yard.timeout_s)
    if ended.codes != [0]:
        raise RuntimeError(f"{words[0]} must end with 0, got {ended.codes}: {ended.words[-600:]}")
