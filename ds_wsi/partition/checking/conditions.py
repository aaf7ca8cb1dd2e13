"""What a module that stays whole decides by: the number of its tiles, or their values, or whether autograd follows.

Chunks of a few tiles may all decide alike where the call's own would not. The forward is recorded for several numbers
of tiles, without values; and what it reads of values is read wrongly on purpose, which must not matter to others.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ds_wsi.partition.checking.case import Case
from ds_wsi.partition.checking.trials import distance
from ds_wsi.partition.execution.stored import KEEP_GRAPHS
from ds_wsi.partition.graph.asked import is_asked
from ds_wsi.partition.graph.record import Example
from ds_wsi.partition.graph.recorded_ops import name_of
from ds_wsi.partition.graph.sizes import FEW, MANY, NAMED
from ds_wsi.partition.graph.trace import Traced
from ds_wsi.partition.module.holdings import PLAIN
from ds_wsi.partition.module.hooks import is_torchs
from ds_wsi.partition.module.observed import Calls, Reads, copied
from ds_wsi.partition.module.outputs import tensors_of
from ds_wsi.partition.module.restored import Restored
from ds_wsi.runtime.memory import says_no_memory

_READS = 8  # that are tried
# What changes no value: hooks, and whether autograd follows.
_OF_AUTOGRAD = {
    Tensor.register_hook, Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook, torch._C._set_grad_enabled,
}  # fmt: skip


def by_number(case: Case, held: Restored, tiles: Tensor, count: int) -> tuple[bool, str | None]:
    """Whether the forward may do something else for more tiles, or where autograd does not follow it.

    Args:
        case: what is checked.
        held: the module.
        tiles: the check's few tiles.
        count: how many tiles the call has.

    Returns:
        (Whether it does for 4 and 6 tiles, as a loop over tiles; why it is refused: it does for `count` alone, or
        without gradients).
    """
    chunk = min((part.chunk_size for part in case.plan.segments), default=count)
    some, few = count > chunk, tiles[:FEW]
    graded = case.backward and any(part.mode not in KEEP_GRAPHS for part in case.plan.segments) and not _has_hooks(case)
    if not some and not graded:
        return False, None
    many = len(few) if not some else count if count <= NAMED else MANY
    with _silently():
        asked = _Asked(case, held, few)
        one, other = asked.calls(len(few)), asked.calls(many, graded=graded)
        same = one is not None and other is not None and _differ(one, other, len(few), many) is None
        refusal = None
        if graded and not same:
            refusal = _by_gradient(case, *(asked.calls(len(few), graded=follows) for follows in (False, False, True)))
        held.rewind()
        return (False, refusal) if same or refusal or not some else _recorded(case, tiles, count)


def _recorded(case: Case, tiles: Tensor, count: int) -> tuple[bool, str | None]:
    """What `by_number` returns, found by recordings."""
    example = Example((count, *tiles.shape[1:]), tiles.dtype, case.device, case.arguments)
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


def _by_gradient(case: Case, *runs: "_Called | None") -> str | None:
    """Why a module is refused that does something else where autograd does not follow it, as in a chunk's first pass.

    Args:
        case: what is checked.
        runs: three runs of the same tiles: two without gradients, which differ by what the module counts or draws,
            and one with them.
    """
    one, again, graded = (None if run is None else run.of_others(case.module) for run in runs)
    if one is None or graded is None or one != again or one == graded:
        return None
    index = next(i for i, (call, other) in enumerate(zip_longest(one, graded)) if call != other)
    name = (graded[index:] or one[index:])[0][2]
    kind = type(case.module.get_submodule(name)).__name__
    return (
        f"{name!r} ({kind}) must do the same with and without gradients, got other operations without. "
        'HINT: mode "keep", or partition the sub-modules before and after it.'
    )


def _has_hooks(case: Case) -> bool:
    """Whether an engine, say, counts the calls of a part that autograd follows."""
    parts = (part for part in case.module.modules() if part is not case.module)
    return any(part._forward_hooks or part._forward_pre_hooks for part in parts)


class _Called(TorchFunctionMode):
    """What torch is asked for: functions, the numbers among their arguments, and the shapes of their results.

    Args:
        calls: what tells which sub-module runs.
    """

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls
        self.functions: list[Any] = []
        self.numbers: list[tuple[Any, ...]] = []
        self.parts: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_asked(name_of(func)) or func in _OF_AUTOGRAD:
            return result
        leaves = pytree.tree_leaves((args, kwargs))
        bounds = [bound for leaf in leaves if isinstance(leaf, slice) for bound in (leaf.start, leaf.stop, leaf.step)]
        sizes = [size for tensor in tensors_of(result) for size in tensor.shape]
        self.functions.append(func)
        self.numbers.append((*(leaf for leaf in (*leaves, *bounds) if type(leaf) in PLAIN), *sizes))
        self.parts.append(self.calls.innermost)
        return result

    def of_others(self, module: nn.Module) -> list[tuple[Any, Any, str]]:
        """The calls of parts of others' classes: torch's own know faster ways to the same where nobody follows."""
        calls = zip(self.functions, self.numbers, self.parts, strict=True)
        return [call for call in calls if not call[2] or not is_torchs(module.get_submodule(call[2]))]


class _Asked:
    """A module that is run on tiles without values, until it is given its own parameters again.

    Args:
        case: what is checked.
        held: the module.
        few: tiles.
    """

    def __init__(self, case: Case, held: Restored, few: Tensor) -> None:
        self.case, self.held, self.few = case, held, few
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            for part in case.module.modules():  # or what a forward writes would be written
                tables: tuple[dict[str, Any], ...] = part._parameters, part._buffers
                for table in tables:
                    table.update(
                        {name: self.fake.from_tensor(item) for name, item in table.items() if item is not None}
                    )

    def calls(self, tiles: int, *, graded: bool = False) -> _Called | None:
        """What the forward asks torch for, of so many tiles; None where it does not take them.

        Recordings would tell in several times the time.
        """
        case = self.case
        calls = Calls(self.held.names, case.module, None, None)
        called = _Called(calls)
        try:
            with torch.set_grad_enabled(graded), self.fake:
                x = torch.empty((tiles, *self.few.shape[1:]), dtype=self.few.dtype, device=case.device)
                x.requires_grad_(graded and case.input_grad and x.is_floating_point())
                with calls, called:
                    case.arguments.call(case.original, x.clone())
        except Exception as error:
            if says_no_memory(error):
                raise
            return None
        return called


def _differ(one: _Called, other: _Called, few: int, many: int) -> int | None:
    """The first call that is not the same in both, or has not the same numbers or as many per tile."""
    functions = zip_longest(one.functions, other.functions)
    numbers = zip_longest(one.numbers, other.numbers)
    for index, ((function, other_function), (first, second)) in enumerate(zip(functions, numbers, strict=True)):
        if function != other_function or len(first) != len(second):
            return index
        if not all(_alike(*pair, few, many) for pair in zip(first, second, strict=True)):
            return index
    return None


def _alike(one: Any, other: Any, few: int, many: int) -> bool:
    """Whether two numbers are the same, or as many per tile."""
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
