"""What a module that stays whole decides by: the number of its tiles, or their values.

Chunks of a few tiles may all decide alike where the call's own would not. The forward is recorded for several numbers
of tiles, without values; and what it reads of values is read wrongly on purpose, which must not matter to others.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ds_wsi.partition.checking.case import Case
from ds_wsi.partition.checking.trials import distance
from ds_wsi.partition.graph.record import Example
from ds_wsi.partition.graph.sizes import FEW, MANY, NAMED
from ds_wsi.partition.graph.trace import Traced
from ds_wsi.partition.module.holdings import PLAIN
from ds_wsi.partition.module.observed import Calls, Reads, copied
from ds_wsi.partition.module.outputs import tensors_of
from ds_wsi.partition.module.restored import Restored
from ds_wsi.runtime.memory import says_no_memory

_READS = 8  # that are tried


def by_number(case: Case, held: Restored, tiles: Tensor, count: int) -> tuple[bool, str | None]:
    """Whether the forward may do something else for more tiles.

    Args:
        case: what is checked.
        held: the module.
        tiles: the check's few tiles.
        count: how many tiles the call has.

    Returns:
        (Whether it does for 4 and 6 tiles, as a loop over tiles; why it is refused: it does for `count` alone).
    """
    chunk = min((part.chunk_size for part in case.plan.segments), default=count)
    if count <= chunk:
        return False, None
    example = Example((count, *tiles.shape[1:]), tiles.dtype, case.device, case.arguments)
    with _silently():
        same = _same_calls(case, tiles[:FEW], count if count <= NAMED else MANY)
        held.rewind()
        if same:
            return False, None
        try:
            traced = Traced(case.module, "batch", example, case.original, whole=False)
        except ValueError as error:
            return "any number of tiles" in str(error), None
        except Exception:
            return False, None
        try:
            traced.require(example)
        except ValueError as error:
            return False, str(error)
    return False, None


class _Called(TorchFunctionMode):
    """What torch is asked for: functions, the numbers among their arguments, and the shapes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []
        self.numbers: list[tuple[Any, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = pytree.tree_leaves((args, kwargs))
        bounds = [bound for leaf in leaves if isinstance(leaf, slice) for bound in (leaf.start, leaf.stop, leaf.step)]
        sizes = [size for tensor in tensors_of(result) for size in tensor.shape]
        self.functions.append(func)
        self.numbers.append((*(leaf for leaf in (*leaves, *bounds) if type(leaf) in PLAIN), *sizes))
        return result


def _same_calls(case: Case, few: Tensor, count: int) -> bool:
    """Whether the forward asks torch for the same for a few tiles and for `count`, which have no values here.

    Two recordings would tell in several times the time.
    """
    one, other = _Called(), _Called()
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
            for part in case.module.modules():  # or what a forward writes would be written
                tables: tuple[dict[str, Any], ...] = part._parameters, part._buffers
                for table in tables:
                    table.update({name: fake.from_tensor(item) for name, item in table.items() if item is not None})
            for size, called in ((len(few), one), (count, other)):
                tiles = torch.empty((size, *few.shape[1:]), dtype=few.dtype, device=case.device)
                with called:
                    case.arguments.call(case.original, tiles)
    except Exception as error:
        if says_no_memory(error):
            raise
        return False
    pairs = zip(one.numbers, other.numbers, strict=False)
    return one.functions == other.functions and all(
        len(mine) == len(theirs) and all(_alike(*pair, len(few), count) for pair in zip(mine, theirs, strict=True))
        for mine, theirs in pairs
    )


def _alike(one: Any, other: Any, few: int, many: int) -> bool:
    """Whether two numbers are the same, or as many a tile."""
    return bool(one == other or (type(one) is type(other) is int and one * many == other * few))


def by_value(case: Case, held: Restored, tiles: Tensor, seen: list[tuple[str, Any]]) -> str | None:
    """The sub-module whose output for some tiles hangs on what it reads of others' values, as a condition does.

    Args:
        case: what is checked.
        held: the module.
        tiles: the check's few tiles.
        seen: what it reads of them, see `Reads`.
    """

    def run(wrong: dict[int, Any]) -> list[Tensor]:
        held.rewind()
        calls = Calls(held.names, held.module, None, None)
        reads, given = Reads(calls, wrong), tiles.clone()
        reads.mark(given)
        with torch.set_grad_enabled(case.backward), calls, reads:
            out = case.arguments.call(case.original, given)
        return [copied(tensor) for tensor in tensors_of(out)]

    before = run({})
    for index, (name, value) in enumerate(seen[:_READS]):
        for other in _others(value):
            try:
                after = run({index: other})
            except Exception as error:
                if says_no_memory(error):
                    raise
                continue
            if _tiles_changed(before, after, len(tiles)) > 1:
                return name
    return None


def _others(value: Any) -> list[Any]:
    """What might have been read in its place; of a whole number nothing can be said."""
    if isinstance(value, bool):
        return [not value]
    return [-1e30, 1e30] if isinstance(value, float) else []


def _tiles_changed(before: list[Tensor], after: list[Tensor], tiles: int) -> int:
    """How many tiles have another output."""
    changed: set[int] = set()
    for one, other in zip(before, after, strict=False):
        if one.shape != other.shape or one.shape[0] % tiles:
            return tiles
        for index, pair in enumerate(zip(one.unflatten(0, (tiles, -1)), other.unflatten(0, (tiles, -1)), strict=True)):
            if distance(*pair) > 1e-6:
                changed.add(index)
    return len(changed)


@contextmanager
def _silently() -> Iterator[None]:
    """Torch logs an error for each operation that raises on tensors without numbers."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
