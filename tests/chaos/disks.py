"""Disks and memory files that are too small."""

from pathlib import Path

from .after import EACH_STEP, RESUMES, compare, go_on, judge_refusal
from .case import LOST, Case, Outcome
from .launch import start, wait
from .mounts import grow, small_disk
from .yard import DROPOUT, Yard, bytes_of, check_checkpoints


def disk_full(case: Case, yard: Yard) -> Outcome:
    """A disk of a part of what the run writes; then there is room, and the run goes on."""
    plain = yard.words(yard.run, case.engine, *DROPOUT)
    whole = yard.whole([*plain, "--save_total_limit", "3"], yard.run, case.engine, case.ranks, "limit3")
    size = max(8192, int(bytes_of(whole) * float(str(case.at).rstrip("%")) / 100) // 4096 * 4096)
    outcome, disk = Outcome(), yard.run.parent
    small_disk(disk, size)
    words = [*plain, *EACH_STEP]
    ended = wait(start(words, case.engine, case.ranks, yard.logs), yard.timeout_s)
    judge_refusal(outcome, ended, r"No space left on device.*HINT")
    check_checkpoints(outcome, yard.run, "after the fault")
    grow(disk)
    if set(ended.codes) != {0}:
        go_on([*words, RESUMES], case, yard, outcome, None)
    compare(outcome, yard.run, whole)
    return outcome


def file_limit(case: Case, yard: Yard) -> Outcome:
    """No file may be larger than some bytes (RLIMIT_FSIZE, a quota's way)."""
    plain = yard.words(yard.run, case.engine, *DROPOUT)
    whole = yard.whole(plain, yard.run, case.engine, case.ranks, "dropout")
    outcome, words = Outcome(), [*plain, *EACH_STEP]
    run = start(words, case.engine, case.ranks, yard.logs, file_bytes=int(str(case.at).split()[0]))
    ended = wait(run, yard.timeout_s)
    judge_refusal(outcome, ended, "File too large")
    check_checkpoints(outcome, yard.run, "after the fault")
    if set(ended.codes) != {0}:
        go_on([*words, RESUMES], case, yard, outcome, None)
    compare(outcome, yard.run, whole)
    return outcome


def small_shm(case: Case, yard: Yard) -> Outcome:
    """A container's /dev/shm, and bags that do not fit into it, read ahead by two processes: the run needs none."""
    more = (*DROPOUT, "--num_train_epochs", "1", "--dataloader_num_workers", "2")
    words = yard.words(yard.run, case.engine, *more, cohort="wide")
    whole = yard.whole(words, yard.run, case.engine, case.ranks, "wide")
    outcome = Outcome()
    small_disk(Path("/dev/shm"), int(str(case.at).split()[0]) * 2**20)
    ended = wait(start(words, case.engine, case.ranks, yard.logs), yard.timeout_s)
    judge_refusal(outcome, ended, "No space")
    outcome.require(set(ended.codes) == {0}, LOST, f"ended with {ended.codes}: {ended.words[-600:]}")
    compare(outcome, yard.run, whole)
    return outcome
