"""Plans kept on disk by what they depend on, so that a search is made once for all processes and runs of a user.

A budget only says what fits. So a plan holds for all budgets between those that it was made for and those that it
needs: of two processes with a little more and a little less free memory, one reads what the other made.
"""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_wsi.partition.planning.depends import FORMAT
from ds_wsi.partition.planning.plan import PartitionPlan
from ds_wsi.partition.planning.rates import cache_path
from ds_wsi.runtime.files import read_object, write_json
from ds_wsi.runtime.locks import in_turn, lock_path
from ds_wsi.runtime.log import logger

AT_MOST = 512  # plans; the ones written first go
WORTH_S = 0.5  # a search that takes less is made again


@dataclass(frozen=True)
class Budgets:
    """Bytes on the device and on the host."""

    gpu: int
    host: int

    def holds(self, other: "Budgets") -> bool:
        """Whether both are at least another's."""
        return self.gpu >= other.gpu and self.host >= other.host


@dataclass(frozen=True)
class Searched:
    """A plan out of a search.

    Attributes:
        plan: the plan.
        most, least: it is the search's answer for all budgets that `most` holds and that hold `least`.
    """

    plan: PartitionPlan
    most: Budgets
    least: Budgets


@dataclass(frozen=True)
class Found:
    """A plan, and where it is from.

    Attributes:
        plan: the plan.
        seconds: how long it took to find.
        path: the file that it was read from, or is kept in; None: it is not kept.
        made: whether it was searched for now.
        why: why it is not kept, or made anew, in words; "" where there is nothing to say.
    """

    plan: PartitionPlan
    seconds: float
    path: Path | None = None
    made: bool = True
    why: str = ""

    @property
    def words(self) -> str:
        """One line: read or made, in which time, and where it is kept."""
        if not self.made:
            return f"the plan was read in {self.seconds:.2g} s from {self.path}"
        where = f"kept in {self.path}" if self.path else f"not kept ({self.why})"
        again = f" ({self.why})" if self.path and self.why else ""
        return f"the plan was made in {self.seconds:.2g} s{again}, and is {where}"


def folder_of_plans() -> Path | None:
    """The folder, beside the measured rates; None for a user without a home."""
    path = cache_path()
    return None if path is None else path.parent / "plans"


def made(search: Callable[[], Searched], why: str) -> Found:
    """The plan of a search, which is not kept for the reason given."""
    start = time.perf_counter()
    plan = search().plan
    return Found(plan, time.perf_counter() - start, why=why)


def find(key: str, budgets: Budgets, search: Callable[[], Searched]) -> Found:
    """The plan that is kept under a key for these budgets; else that of a search, which is kept then.

    Processes that ask for one key take turns, so that one searches and the others read.

    Raises:
        ValueError: the search's.
    """
    start = time.perf_counter()
    folder = folder_of_plans()
    if folder is None:
        return made(search, "there is no home folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        turn = in_turn(lock_path(folder, key))
        turn.__enter__()
    except OSError as error:
        return made(search, str(error))
    try:
        kept, why = _read(folder, key, budgets)
        if kept is not None:
            path, plan = kept
            return Found(plan, time.perf_counter() - start, path, made=False)
        searched = search()
        took = time.perf_counter() - start
        if took < WORTH_S:
            return Found(searched.plan, took, why=why or "it is made quickly")
        path = _path(folder, key, searched)
        try:
            _write(path, key, searched)
        except OSError as error:
            return Found(searched.plan, time.perf_counter() - start, why=str(error))
        return Found(searched.plan, time.perf_counter() - start, path, why=why)
    finally:
        turn.__exit__(None, None, None)


def _path(folder: Path, key: str, searched: Searched) -> Path:
    return folder / f"{key}-{searched.most.gpu}-{searched.most.host}.json"


def _read(folder: Path, key: str, budgets: Budgets) -> tuple[tuple[Path, PartitionPlan] | None, str]:
    """A kept plan for these budgets, or why there is none that can be read."""
    why = ""
    for path in sorted(folder.glob(f"{key}-*.json")):
        try:
            most, least, plan = _plan_of(read_object(path, "a kept plan"), key)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            why = f"{path.name} is no plan: {error}"
            logger.warning("%s is not a kept plan (%s): it is made anew", path, error)
            continue
        if most.holds(budgets) and budgets.holds(least):
            return (path, replace(plan, gpu_budget_bytes=budgets.gpu, host_budget_bytes=budgets.host)), ""
    return None, why


def _plan_of(content: dict[str, Any], key: str) -> tuple[Budgets, Budgets, PartitionPlan]:
    """What a file holds.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is not as it was written, or of another key.
    """
    body = content["body"]
    if content["seal"] != _seal(body):
        raise ValueError("its seal is not that of its content")
    if body["format"] != FORMAT or body["key"] != key:
        raise ValueError("it is of something else")
    plan = PartitionPlan.from_section(body["plan"])
    return Budgets(*body["most"]), Budgets(*body["least"]), plan


def _write(path: Path, key: str, searched: Searched) -> None:
    most, least = ([budgets.gpu, budgets.host] for budgets in (searched.most, searched.least))
    plan = json.loads(json.dumps(searched.plan.to_section()))
    body = {"format": FORMAT, "key": key, "most": most, "least": least, "plan": plan}
    write_json(path, {"seal": _seal(body), "body": body})
    with suppress(OSError):  # another process may tidy too
        kept = sorted(path.parent.glob("*-*.json"), key=lambda one: one.stat().st_mtime)
        for old in kept[:-AT_MOST]:
            old.unlink()


def _seal(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
