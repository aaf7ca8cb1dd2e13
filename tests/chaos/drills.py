"""What is done of each fault, and what must hold then: a function of a case and its yard each."""

import csv
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors import safe_open

from ds_wsi.training.checkpoint import list_checkpoints

from .case import HUNG, LEFT, LOST, SILENT, Case, Moment, NotRunError, Outcome, Shot
from .launch import Ended, Started, start, wait
from .mounts import grow, small_disk
from .yard import (
    DROPOUT,
    Strangers,
    Yard,
    bytes_of,
    check_checkpoints,
    check_nothing_left,
    differences,
    is_marked,
    steps_kept,
)

STOPPED = 75
RESUMES = "--resume_from_checkpoint"
EACH_STEP = ("--save_steps", "1", "--save_total_limit", "3")


@dataclass(frozen=True)
class Hit:
    """A fault that hits a rank at a moment.

    Args:
        action: of the injector.
        code: the exit status of the rank that is hit.
        of_others: theirs.
        says: a regular expression for what the rank itself prints.
        others_say: one for what the others print; {rank} and {ranks} are filled in.
        options: of the run that is hit.
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
        _go_on([*words, RESUMES], case, yard, outcome, strangers)
    _compare(outcome, yard.run, whole)
    return outcome


def _judge(outcome: Outcome, how: Hit, case: Case, ended: Ended, rank: int | None) -> None:
    outcome.codes = ended.codes
    outcome.require(not ended.hung, HUNG, f"a rank was killed after {ended.seconds:.0f} s: {ended.words[-300:]}")
    outcome.require(not ended.left, LEFT, f"processes: {ended.left}")
    assert isinstance(case.at, Moment)
    for number, (code, printed) in enumerate(zip(ended.codes, ended.printed, strict=True)):
        if code is None:
            continue
        own = rank is None or number == rank
        if not own and code == 0 and case.at.place in _LAST:
            continue
        wanted = how.code if own else how.of_others
        outcome.require(code == wanted, SILENT, f"rank {number} ended with {code}, not {wanted}: {printed[-300:]}")
        says = how.says if own else how.others_say.format(rank=rank, ranks=case.ranks)
        if how.of_all and number > 0:
            continue  # what all ranks do together the first one tells
        outcome.require(re.search(says, printed), SILENT, f"rank {number} does not say {says!r}: {printed[-400:]}")


def _leave_a_deadlock(run: Started, yard: Yard, outcome: Outcome) -> Outcome:
    """One process that waits for itself for ever: a second Ctrl-C leaves at once."""
    _await(yard.place / "held", yard.timeout_s)
    os.kill(run.pids[0], signal.SIGINT)
    time.sleep(2)
    os.kill(run.pids[0], signal.SIGINT)
    ended = wait(run, time.monotonic() - run.began + 20)
    outcome.codes = ended.codes
    outcome.require(not ended.hung, HUNG, "a second Ctrl-C did not end it within 20 s")
    outcome.require(ended.codes in ([128 + signal.SIGINT], [None]), SILENT, f"ended with {ended.codes}, not 130")
    outcome.require("a second SIGINT" in ended.words, SILENT, f"does not say so: {ended.words[-300:]}")
    return outcome


def _await(path: Path, timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > until:
            raise RuntimeError(f"the moment did not come: {path.name} is missing")
        time.sleep(0.05)


def _go_on(words: Sequence[str], case: Case, yard: Yard, outcome: Outcome, strangers: Strangers | None) -> Ended:
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


def _compare(outcome: Outcome, folder: Path, whole: Path) -> None:
    found = differences(folder, whole)
    outcome.require(not found, LOST, f"not the uninterrupted run's: {', '.join(found)}")
    check_checkpoints(outcome, folder, "at the end")
    check_nothing_left(outcome, folder)


def disk_full(case: Case, yard: Yard) -> Outcome:
    """A disk of a part of what the run writes; then there is room, and the run goes on."""
    plain = yard.words(yard.run, case.engine, *DROPOUT)
    whole = yard.whole([*plain, "--save_total_limit", "3"], yard.run, case.engine, case.ranks, "limit3")
    size = max(8192, int(bytes_of(whole) * float(str(case.at).rstrip("%")) / 100) // 4096 * 4096)
    outcome, disk = Outcome(), yard.run.parent
    small_disk(disk, size)
    words = [*plain, *EACH_STEP]
    ended = wait(start(words, case.engine, case.ranks, yard.logs), yard.timeout_s)
    _judge_full(outcome, ended, r"No space left on device.*HINT")
    check_checkpoints(outcome, yard.run, "after the fault")
    grow(disk)
    if set(ended.codes) != {0}:
        _go_on([*words, RESUMES], case, yard, outcome, None)
    _compare(outcome, yard.run, whole)
    return outcome


def _judge_full(outcome: Outcome, ended: Ended, says: str) -> None:
    outcome.codes = ended.codes
    outcome.require(not ended.hung, HUNG, f"killed after {ended.seconds:.0f} s: {ended.words[-300:]}")
    outcome.require(not ended.left, LEFT, f"processes: {ended.left}")
    for number, (code, printed) in enumerate(zip(ended.codes, ended.printed, strict=True)):
        outcome.require(code in (0, 2, None), SILENT, f"rank {number} ended with {code}: {printed[-600:]}")
    if set(ended.codes) != {0}:
        outcome.require(re.search(says, ended.words), SILENT, f"nobody says {says!r}: {ended.words[-600:]}")


def file_limit(case: Case, yard: Yard) -> Outcome:
    """No file may be larger than some bytes (RLIMIT_FSIZE, a quota's way)."""
    plain = yard.words(yard.run, case.engine, *DROPOUT)
    whole = yard.whole(plain, yard.run, case.engine, case.ranks, "dropout")
    outcome, words = Outcome(), [*plain, *EACH_STEP]
    run = start(words, case.engine, case.ranks, yard.logs, file_bytes=int(str(case.at).split()[0]))
    ended = wait(run, yard.timeout_s)
    _judge_full(outcome, ended, "File too large")
    check_checkpoints(outcome, yard.run, "after the fault")
    if set(ended.codes) != {0}:
        _go_on([*words, RESUMES], case, yard, outcome, None)
    _compare(outcome, yard.run, whole)
    return outcome


def small_shm(case: Case, yard: Yard) -> Outcome:
    """A container's /dev/shm, and bags that do not fit into it, read ahead by two processes: the run needs none."""
    more = (*DROPOUT, "--num_train_epochs", "1", "--dataloader_num_workers", "2")
    words = yard.words(yard.run, case.engine, *more, cohort="wide")
    whole = yard.whole(words, yard.run, case.engine, case.ranks, "wide")
    outcome = Outcome()
    small_disk(Path("/dev/shm"), int(str(case.at).split()[0]) * 2**20)
    ended = wait(start(words, case.engine, case.ranks, yard.logs), yard.timeout_s)
    _judge_full(outcome, ended, "No space")
    outcome.require(set(ended.codes) == {0}, LOST, f"ended with {ended.codes}: {ended.words[-600:]}")
    _compare(outcome, yard.run, whole)
    return outcome


PLACES_OF_BYTE = {"first": 0.0, "middle": 0.5, "last": 1.0}


def flip(path: Path, place: str) -> None:
    """Turn one bit of one byte round."""
    data = bytearray(path.read_bytes())
    at = round((len(data) - 1) * PLACES_OF_BYTE[place])
    data[at] ^= 0x01
    path.write_bytes(data)


def flipped_checkpoint(case: Case, yard: Yard) -> Outcome:
    """A bit of a file of the newest checkpoint is turned: it is named, and the checkpoint before it is taken."""
    number, place = str(case.at).split()[1:3]
    more = (*DROPOUT, "--ema_decay", "0.9", *EACH_STEP)
    words = yard.words(yard.run, case.engine, *more)
    whole = yard.whole(words, yard.run, case.engine, case.ranks, "average")
    torn = yard.root / f"killed-{case.engine}-{case.ranks}"
    if not torn.exists():
        shots = (Shot("kill", Moment("step", 9 // case.ranks), 0),)
        wait(start(words, case.engine, case.ranks, yard.logs, shots=shots), yard.timeout_s)
        yard.run.rename(torn)
    outcome = Outcome()
    shutil.copytree(torn, yard.run)
    newest = list_checkpoints(yard.run)[0]
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    if int(number) >= len(files):
        raise NotRunError(f"{newest.name} has {len(files)} files")
    damaged = files[int(number)]
    flip(damaged, place)
    ended = _go_on([*words, RESUMES], case, yard, outcome, None)
    outcome.codes = ended.codes
    named = r"is torn \(" if damaged.name == "files.json" else rf"is torn \({re.escape(damaged.name)} "
    outcome.require(re.search(named, ended.words), SILENT, f"{damaged.name} is not named: {ended.words[-600:]}")
    _compare(outcome, yard.run, whole)
    outcome.detail = outcome.detail or damaged.name
    return outcome


def flipped_store(case: Case, yard: Yard) -> Outcome:
    """A bit of a slide's packed tiles is turned: the run says so or is not changed, and `tile --verify` mends it."""
    number, place = str(case.at).split()[1:3]
    folder, outcome = yard.cohort("slides"), Outcome()
    tiles, store = yard.place / "tiles", yard.place / "store"
    of_slides = ["--manifest", str(folder / "slides.csv"), "--tile_size_px", "64"]
    pack = ["tile", *of_slides, "--output_dir", str(tiles), "--store", str(store), "--verify"]
    of_train = [*of_slides, "--tiles_dir", str(tiles), "--tile_store", str(store), "--encoder", "resnet10t"]
    of_train += ["--freeze_encoder", "--num_train_epochs", "1", "--dataloader_num_workers", "0", "--disable_tqdm"]
    _must_end(pack, yard)
    words = ["train", *of_train, "--output_dir", str(yard.run)]
    whole = yard.whole(words, yard.run, "plain", 1, "store")
    files = sorted(path for path in store.iterdir() if path.is_file())
    if int(number) >= len(files):
        raise NotRunError(f"the store has {len(files)} files")
    damaged, sound = files[int(number)], files[int(number)].read_bytes()
    flip(damaged, place)
    ended = wait(start(words, "plain", 1, yard.logs), yard.timeout_s)
    _judge_full(outcome, ended, re.escape(damaged.name))
    told = damaged.name in ended.words or damaged.stem in ended.words
    changed = ended.codes == [0] and bool(differences(yard.run, whole))
    outcome.require(told or not changed, SILENT, f"{damaged.name}: other weights, and nothing is said")
    outcome.detail = f"{damaged.name}: {'other weights, told' if changed else f'ended with {ended.codes[0]}'}"
    _must_end(pack, yard)
    mended = damaged.read_bytes() == sound
    shutil.rmtree(yard.run, ignore_errors=True)
    _must_end(words, yard)
    outcome.require(not differences(yard.run, whole), LOST, f"not mended by tile --verify (same bytes: {mended})")
    return outcome


def packing(action: str, case: Case, yard: Yard) -> Outcome:
    """Slides are tiled and packed, and a fault hits: the same command again ends with the files of a whole one."""
    assert isinstance(case.at, Moment)
    outcome, strangers = Outcome(), Strangers(yard.place)
    tiles, store = yard.run / "tiles", yard.run / "store"
    for folder in (yard.run.parent, tiles, store):
        strangers.plant(folder)
    words = ["tile", "--manifest", str(yard.cohort("slides") / "slides.csv"), "--tile_size_px", "64"]
    words += ["--output_dir", str(tiles), "--store", str(store), "--workers", "2"]
    whole = yard.root / "whole" / "packed"
    if not whole.exists():
        _must_end([word.replace(str(yard.run), str(whole)) for word in words], yard)
    hold = {"CHAOS_HOLD": str(yard.place)}
    first = start(words, "plain", 1, yard.logs, shots=(Shot(action, case.at),), variables=hold)
    if action == "hold":
        _await(yard.place / "held", yard.timeout_s)
        second = start(words, "plain", 1, yard.logs)
        time.sleep(5)  # it does the other slides meanwhile
        (yard.place / "go").touch()
        other = wait(second, yard.timeout_s, beside=first.pids)
        outcome.require(other.codes == [0], LOST, f"the second ended with {other.codes}: {other.words[-600:]}")
    ended = wait(first, yard.timeout_s)
    outcome.codes = ended.codes
    wanted = {"kill": -signal.SIGKILL, "hold": 0}.get(action, STOPPED)
    outcome.require(not ended.hung, HUNG, f"killed after {ended.seconds:.0f} s: {ended.words[-300:]}")
    outcome.require(ended.codes in ([wanted], [None]), SILENT, f"ended with {ended.codes}: {ended.words[-400:]}")
    strangers.check(outcome, "the fault")
    again = wait(start(words, "plain", 1, yard.logs), yard.timeout_s)
    outcome.require(again.codes == [0], LOST, f"again: {again.codes}: {again.words[-600:]}")
    strangers.check(outcome, "the second start")
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.suffix in (".safetensors", ".arrow")]
    changed = [str(name) for name in files if not _is_same(yard.run / name, whole / name)]
    outcome.require(files and not changed, LOST, f"not the files of a whole packing: {changed}")
    check_nothing_left(outcome, yard.run)
    return outcome


def _is_same(one: Path, other: Path) -> bool:
    if not one.is_file() or one.suffix != ".safetensors":
        return one.is_file() and one.read_bytes() == other.read_bytes()
    return _content(one) == _content(other)


def _content(path: Path) -> tuple[object, ...]:
    """Of a file of tensors, whose header has no order."""
    with safe_open(path, "np") as file:
        return dict(file.metadata() or {}), {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def _must_end(words: Sequence[str], yard: Yard) -> None:
    ended = wait(start(words, "plain", 1, yard.logs), yard.timeout_s)
    if ended.codes != [0]:
        raise RuntimeError(f"{words[0]} must end with 0, got {ended.codes}: {ended.words[-600:]}")


def double_start(case: Case, yard: Yard) -> Outcome:
    """The same command a second time while the first is held at a moment: refused, and the first goes on."""
    assert isinstance(case.at, Moment)
    plain = yard.words(yard.run, case.engine, *DROPOUT)
    whole = yard.whole(plain, yard.run, case.engine, case.ranks, "dropout")
    words, outcome = [*plain, *EACH_STEP, RESUMES], Outcome()
    hold = {"CHAOS_HOLD": str(yard.place)}
    shots = (Shot("hold", case.at, 0),)
    first = start(words, case.engine, case.ranks, yard.logs, shots=shots, variables=hold)
    _await(yard.place / "held", yard.timeout_s)
    second = wait(start(words, case.engine, case.ranks, yard.logs), yard.timeout_s, beside=first.pids)
    (yard.place / "go").touch()
    ended = wait(first, 2 * yard.timeout_s)
    outcome.codes = [*ended.codes, *second.codes]
    outcome.require(not second.hung, HUNG, "the second start was killed")
    outcome.require(second.codes[0] == 2, SILENT, f"the second start ended with {second.codes}: {second.words[-300:]}")
    outcome.require(
        re.search(r"in which process \d+", second.words), SILENT, f"does not say who: {second.words[-300:]}"
    )
    outcome.require(set(ended.codes) == {0}, LOST, f"the first start ended with {ended.codes}: {ended.words[-600:]}")
    _compare(outcome, yard.run, whole)
    return outcome


TOLERANCE = 2e-5  # of a probability, after steps whose sums have another order


def other_ranks(case: Case, yard: Yard) -> Outcome:
    """A run that other engines on other numbers of ranks go on with: the same steps, but for rounding."""
    legs = [leg.split() for leg in str(case.at).split(", ")]
    of_run = ("--bags_per_step", "4", "--optim", "sgd", "--momentum", "0.9", "--learning_rate", "0.05")
    whole = yard.whole(yard.words(yard.run, "plain", *of_run), yard.run, "plain", 1, "by four")
    outcome = Outcome()
    for number, (engine, ranks) in enumerate(legs):
        shots = (Shot("SIGTERM", Moment("step")),) if number < len(legs) - 1 else ()
        words = [*yard.words(yard.run, engine, *of_run), RESUMES]
        before = steps_kept(yard.run)
        ended = wait(start(words, engine, int(ranks), yard.logs, shots=shots), yard.timeout_s)
        wanted = STOPPED if shots else 0
        outcome.codes += ended.codes
        outcome.require(not ended.hung, HUNG, f"{engine} on {ranks} was killed after {ended.seconds:.0f} s")
        told = f"{engine} on {ranks}: {ended.codes}: {ended.words[-600:]}"
        outcome.require(set(ended.codes) == {wanted}, LOST, told)
        outcome.require(steps_kept(yard.run) > before, LOST, f"{engine} on {ranks} took no step after {before}")
        outcome.require(not ended.left, LEFT, f"processes: {ended.left}")
        check_checkpoints(outcome, yard.run, f"{engine} on {ranks}")
        if outcome.ways:
            return outcome
    error = largest_difference(yard.run, whole)
    outcome.require(error <= TOLERANCE, LOST, f"probabilities differ by {error:.1e}")
    check_nothing_left(outcome, yard.run)
    outcome.detail = outcome.detail or f"probabilities differ by {error:.1e}"
    return outcome


def largest_difference(folder: Path, whole: Path) -> float:
    """Of the numbers in two runs' predictions."""
    tables = []
    for place in (folder, whole):
        with (place / "predictions.csv").open(newline="", encoding="utf-8") as file:
            tables.append(list(csv.reader(file)))
    pairs = [pair for rows in zip(*tables, strict=True) for pair in zip(*rows, strict=True)]
    return max((abs(_number(a) - _number(b)) for a, b in pairs if a != b), default=0.0)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")


Drill = Callable[[Case, Yard], Outcome]
DRILLS: dict[str, Drill] = {
    **{name: hit for name in HITS},
    "disk full": disk_full,
    "file too large": file_limit,
    "small /dev/shm": small_shm,
    "flipped bit of a checkpoint": flipped_checkpoint,
    "flipped bit of a store": flipped_store,
    "packing killed": partial(packing, "kill"),
    "packing asked to end": partial(packing, "SIGTERM"),
    "packing twice": partial(packing, "hold"),
    "double start": double_start,
    "other ranks": other_ranks,
}
