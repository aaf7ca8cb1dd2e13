"""Several processes one after the other, or at once, in one folder."""

import csv
import re
import signal
import time
from pathlib import Path

from safetensors import safe_open

from .after import EACH_STEP, RESUMES, STOPPED, await_file, compare, must_end
from .case import HUNG, LEFT, LOST, SILENT, Case, Moment, Outcome, Shot
from .launch import start, wait
from .yard import DROPOUT, Strangers, Yard, check_checkpoints, check_nothing_left, steps_kept


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
        must_end([word.replace(str(yard.run), str(whole)) for word in words], yard)
    hold = {"CHAOS_HOLD": str(yard.place)}
    first = start(words, "plain", 1, yard.logs, shots=(Shot(action, case.at),), variables=hold)
    if action == "hold":
        await_file(yard.place / "held", yard.timeout_s)
        second = start(words, "plain", 1, yard.logs)
        time.sleep(5)  # it does the other slides meanwhile
        (yard.place / "go").touch()
        other = wait(second, yard.timeout_s, beside=first.pids)
        outcome.require(other.codes == [0], LOST, f"the second ended with {other.codes}: {other.words[-600:]}")
    ended = wait(first, yard.timeout_s)
    outcome.codes = ended.codes
    expected = {"kill": -signal.SIGKILL, "hold": 0}.get(action, STOPPED)
    outcome.require(not ended.hung, HUNG, f"killed after {ended.seconds:.0f} s: {ended.words[-300:]}")
    outcome.require(ended.codes in ([expected], [None]), SILENT, f"ended with {ended.codes}: {ended.words[-400:]}")
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
    """Metadata and tensors of a file, whose header has no order."""
    with safe_open(path, "np") as file:
        return dict(file.metadata() or {}), {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def double_start(case: Case, yard: Yard) -> Outcome:
    """The same command a second time while the first is held at a moment: refused, and the first goes on."""
    assert isinstance(case.at, Moment)
    plain = yard.words(yard.run, case.engine, *DROPOUT)
    whole = yard.whole(plain, yard.run, case.engine, case.ranks, "dropout")
    words, outcome = [*plain, *EACH_STEP, RESUMES], Outcome()
    hold = {"CHAOS_HOLD": str(yard.place)}
    shots = (Shot("hold", case.at, 0),)
    first = start(words, case.engine, case.ranks, yard.logs, shots=shots, variables=hold)
    await_file(yard.place / "held", yard.timeout_s)
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
    compare(outcome, yard.run, whole)
    return outcome


def again_and_again(case: Case, yard: Yard) -> Outcome:
    """Each start is killed at its step of this number, until one comes to the end: none may be for nothing."""
    assert isinstance(case.at, Moment)
    plain = yard.words(yard.run, case.engine, *DROPOUT)
    whole = yard.whole(plain, yard.run, case.engine, case.ranks, "dropout")
    words, outcome, shots = [*plain, *EACH_STEP, RESUMES], Outcome(), (Shot("kill", case.at),)
    while True:
        before = steps_kept(yard.run)
        ended = wait(start(words, case.engine, case.ranks, yard.logs, shots=shots), yard.timeout_s)
        outcome.codes += ended.codes
        outcome.require(not ended.hung, HUNG, f"killed after {ended.seconds:.0f} s: {ended.words[-300:]}")
        outcome.require(not ended.left, LEFT, f"processes: {ended.left}")
        if set(ended.codes) == {0}:
            break
        outcome.require(set(ended.codes) == {-signal.SIGKILL}, LOST, f"{ended.codes}: {ended.words[-600:]}")
        outcome.require(steps_kept(yard.run) > before, LOST, f"no step is kept after {before}")
        check_checkpoints(outcome, yard.run, f"after step {before}")
        if outcome.ways:
            return outcome
    compare(outcome, yard.run, whole)
    outcome.detail = outcome.detail or f"{len(outcome.codes) // case.ranks} starts"
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
        expected = STOPPED if shots else 0
        outcome.codes += ended.codes
        outcome.require(not ended.hung, HUNG, f"{engine} on {ranks} was killed after {ended.seconds:.0f} s")
        told = f"{engine} on {ranks}: {ended.codes}: {ended.words[-600:]}"
        outcome.require(set(ended.codes) == {expected}, LOST, told)
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
    """The largest difference between numbers of two runs' predictions."""
    tables = []
    for run_folder in (folder, whole):
        with (run_folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
            tables.append(list(csv.reader(file)))
    pairs = [pair for rows in zip(*tables, strict=True) for pair in zip(*rows, strict=True)]
    return max((abs(_number(a) - _number(b)) for a, b in pairs if a != b), default=0.0)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")
