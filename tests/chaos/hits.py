"""A fault that hits a rank at a moment; then the same command again, and the bits of an uninterrupted run."""

import os
import re
import signal
import time
from dataclasses import dataclass

from .after import EACH_STEP, RESUMES, STOPPED, await_file, compare, go_on
from .case import HUNG, LEFT, LOST, SILENT, Case, Moment, Outcome, Shot
from .launch import Ended, Started, start, wait
from .yard import DROPOUT, Strangers, Yard, check_checkpoints, steps_kept


@dataclass(frozen=True)
class Hit:
    """A fault that hits a rank at a moment.

    Args:
        action: one of the injector's.
        code: the exit status of the rank that is hit.
        of_others: theirs.
        says: a regular expression for what the rank itself prints.
        others_say: one for what the others print; {rank} and {ranks} are filled in.
        options: words for the run that is hit.
        stays: the rank does not end: its launcher kills it when the others have ended.
        goes_on_after_s: a stopped rank is told to go on.
        of_all: ranks that a launcher passes it on to, where the case names none.
    """

    action: str
    code: int
    of_others: int = 2
    says: str = ""
    others_say: str = r"rank {rank}/{ranks}"
    options: tuple[str, ...] = ()
    stays: bool = False
    goes_on_after_s: float | None = None
    of_all: bool = False


_SHORT = ("--ddp_timeout", "20")
_ASKED = {"code": STOPPED, "of_others": STOPPED, "says": "stopped by .*: the same command goes on", "others_say": ""}
_WORKER = ("--dataloader_num_workers", "1", "--read_timeout", "4")
HITS = {
    "kill": Hit("kill", -signal.SIGKILL, options=EACH_STEP),
    **{name: Hit(name, of_all=True, **_ASKED) for name in ("SIGTERM", "SIGUSR1", "SIGINT")},  # type: ignore[arg-type]
    "exception": Hit("raise", 1, says="ChaosError: injected", options=EACH_STEP),
    "segfault": Hit("segfault", -signal.SIGSEGV, options=EACH_STEP),
    "stopped for ever": Hit(
        "stop",
        -signal.SIGKILL,
        others_say=r"rank {rank}/{ranks} does not go on .*is stopped",
        options=_SHORT,
        stays=True,
    ),
    "deadlock": Hit("deadlock", -signal.SIGKILL, others_say="did not meet in a collective", options=_SHORT, stays=True),
    "slow": Hit("slow", 0, of_others=0, others_say=""),
    "stopped, goes on": Hit("stop", 0, of_others=0, others_say="", goes_on_after_s=8),
    "worker stopped": Hit("stop worker", 2, says="reading process 0.*it is stopped", options=_WORKER),
    "worker killed": Hit("kill worker", 2, says="reading process 0.*killed by SIGKILL", options=_WORKER),
}
HITS |= {
    "validator killed": Hit("kill worker", 2, says="must live as long as the run, got death by SIGKILL"),
    "validator stopped": Hit("stop worker", 2, says="is stopped.*validating epoch", options=("--read_timeout", "4")),
}
_LAST = ("results", "record")  # of the main process alone: the others may have ended


def hit(case: Case, yard: Yard) -> Outcome:
    """A fault at a moment, then the same command again: it ends with the weights of the uninterrupted run."""
    how, outcome, strangers = HITS[case.fault], Outcome(), Strangers(yard.place)
    assert isinstance(case.at, Moment)
    strangers.plant(yard.run.parent)
    plain = yard.words(yard.run, case.engine, *DROPOUT)
    whole = yard.whole(plain, yard.run, case.engine, case.ranks, "dropout")
    words = [*plain, *how.options]
    rank = case.rank if case.rank is not None or how.of_all else 0
    hold = {"CHAOS_HOLD": str(yard.place)}
    shots = (Shot(how.action, case.at, rank),)
    run = start(words, case.engine, case.ranks, yard.logs, shots=shots, variables=hold)
    if how.action == "deadlock" and case.ranks == 1:
        return _leave_a_deadlock(run, yard, outcome)
    stays = () if not how.stays or rank is None else (rank,)
    ended = wait(run, yard.timeout_s, stays=stays, goes_on_after_s=how.goes_on_after_s)
    _judge(outcome, how, case, ended, rank)
    strangers.check(outcome, "the fault")
    check_checkpoints(outcome, yard.run, "after the fault")
    if how.code == STOPPED and case.at.place == "step" and not case.at.delay_s:
        kept = steps_kept(yard.run)
        outcome.require(kept > case.at.number, LOST, f"checkpoint of step {kept}, asked in step {case.at.number}")
    if set(ended.codes) != {0}:
        go_on([*words, RESUMES], case, yard, outcome, strangers)
    compare(outcome, yard.run, whole)
    return outcome


def _judge(outcome: Outcome, how: Hit, case: Case, ended: Ended, rank: int | None) -> None:
    outcome.codes = ended.codes
    outcome.require(not ended.hung, HUNG, f"a rank was killed after {ended.seconds:.0f} s: {ended.words[-300:]}")
    outcome.require(not ended.left, LEFT, f"processes: {ended.left}")
    assert isinstance(case.at, Moment)
    for number, (code, printed) in enumerate(zip(ended.codes, ended.printed, strict=True)):
        if code is None:
            continue
        is_hit = rank is None or number == rank
        if not is_hit and code == 0 and case.at.place in _LAST:
            continue
        expected = how.code if is_hit else how.of_others
        outcome.require(code == expected, SILENT, f"rank {number} ended with {code}, not {expected}: {printed[-300:]}")
        says = how.says if is_hit else how.others_say.format(rank=rank, ranks=case.ranks)
        if rank == 0 and not is_hit and says:
            says += "|rank 0, or the launcher"  # the store of the ranks' words may have died with it
        if how.of_all and number > 0:
            continue  # what all ranks do together the first one tells
        outcome.require(re.search(says, printed), SILENT, f"rank {number} does not say {says!r}: {printed[-400:]}")


def _leave_a_deadlock(run: Started, yard: Yard, outcome: Outcome) -> Outcome:
    """One process that waits for itself for ever: a second Ctrl-C leaves at once."""
    await_file(yard.place / "held", yard.timeout_s)
    os.kill(run.pids[0], signal.SIGINT)
    time.sleep(2)
    os.kill(run.pids[0], signal.SIGINT)
    ended = wait(run, time.monotonic() - run.began + 20)
    outcome.codes = ended.codes
    outcome.require(not ended.hung, HUNG, "a second Ctrl-C did not end it within 20 s")
    outcome.require(ended.codes in ([128 + signal.SIGINT], [None]), SILENT, f"ended with {ended.codes}, not 130")
    outcome.require("a second SIGINT" in ended.words, SILENT, f"does not say so: {ended.words[-300:]}")
    return outcome
