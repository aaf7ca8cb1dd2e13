"""Runs of a module on a few tiles, alone and partitioned, and how far their results are apart."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_wsi.partition.graph.segments import leaving_remainders
from ds_wsi.partition.graph.unrecorded import ForbiddenError
from ds_wsi.partition.module.arguments import Arguments
from ds_wsi.partition.module.observed import Calls, Operations, Reads, Recorded, copied, size, version_of
from ds_wsi.partition.module.outputs import form_of, tensors_of
from ds_wsi.partition.module.restored import Restored
from ds_wsi.runtime.seams import storage_key

INPUT_AFTER = "input after the call"
_SMALL = 1e-2  # of the largest gradient: what is smaller is compared with that
_NOTHING = 1e-4  # gradients of outputs' random sums, and statistics, that are smaller throughout are rounding
_FAINT = 1e-3  # the same of sub-modules' outputs: a norm of equal tiles is rounding alone


@dataclass
class Outcome:
    """What one run gave and left behind, in host memory.

    Attributes:
        values: outputs, the input after the run, gradients; None for a gradient that is not there.
        state: buffers and tensors that are attributes.
        attributes: plain ones, by (part, name).
        moved: names of the generators that it drew from.
        marks: where all generators are.
    """

    values: dict[str, Tensor | None]
    state: dict[str, Tensor]
    attributes: dict[tuple[str, str], Any]
    moved: list[str]
    marks: list[bytes]


@dataclass
class Trials:
    """Runs on the same tiles, each from the same beginning.

    Args:
        held: the module.
        original: the module's own forward.
        partitioned: makes the module's forward in the partition, with chunks of a size.
        arguments: the call's arguments beside the tiles.
        tiles: [n, ...], or images.
        backward: whether gradients are compared.
        input_grad: whether one reaches the tiles.
        by_tile: whether outputs have tiles on their first axis.
    """

    held: Restored
    original: Callable[..., Any]
    partitioned: Callable[[int], Callable[..., Any]]
    arguments: Arguments
    tiles: Tensor
    backward: bool
    input_grad: bool
    by_tile: bool = True
    recorded: Recorded = field(default_factory=Recorded)
    apart: dict[str, float] = field(default_factory=dict)  # of sub-modules, in the last partitioned run
    coarsest: float = 0.0  # eps of what the module alone computed in
    reads: list[tuple[str, Any]] = field(default_factory=list)  # of its tiles' values, by Python, in the module alone

    def __post_init__(self) -> None:
        self._adopted: list[torch.Generator] = []
        self._forwards: dict[int, Callable[..., Any]] = {}  # a second run has the first one's traces

    def plain(self, *, record: bool = True) -> Outcome:
        """The module alone.

        Raises:
            ValueError: its output does not have tiles on its first axis.
            ForbiddenError: it writes a parameter, or trains a tensor that is none.
        """
        self.held.rewind()
        if record:
            self.recorded = Recorded()
        calls = Calls(self.held.names, self.held.module, None, self.recorded.add if record else None)

        def own(generator: torch.Generator, name: str) -> None:
            if all(id(generator) != held_id for held_id in self._known()):
                self.held.adopt(generator, f"{name}'s own")
                self._adopted.append(generator)

        memory = self.held.memory()

        def refuse(tensor: Tensor) -> None:
            name = memory.get(storage_key(tensor)) if tensor.layout is torch.strided else None
            if name is not None:
                raise ForbiddenError(self.held.must_not_write(name))

        operations = Operations(calls, own, refuse)
        reads = Reads(calls, {})
        outcome = self._run(self.original, self.tiles, watch=(calls, operations, reads), alone=True)
        self.reads = reads.seen
        self.coarsest = operations.coarsest
        self.recorded.forget()
        replaced = self.held.replaced_parameter()
        if replaced is not None:
            raise ForbiddenError(self.held.must_not_write(replaced))
        return outcome

    def partition(self, chunk: int, *, rows: bool = False) -> Outcome:
        """The module in chunks of this size; what its sub-modules give is compared: of tiles, or of `rows`."""
        if chunk not in self._forwards:
            self._forwards[chunk] = self.partitioned(chunk)
        self.held.rewind()
        self.apart = {}
        calls = Calls(self.held.names, self.held.module, None, self._compare if self.by_tile or rows else None)
        with leaving_remainders():
            return self._run(self._forwards[chunk], self.tiles, watch=(calls,))

    def reversed(self) -> Outcome:
        """The module alone with its tiles in the opposite order, its results put back in order: the noise."""
        self.held.rewind()
        self.apart = {}
        calls = Calls(self.held.names, self.held.module, None, self._compare_reversed)
        outcome = self._run(self.original, self.tiles.flip(0), watch=(calls,), flip=True)
        return outcome

    @property
    def faint(self) -> float:
        """A number that is small beside what the sub-modules gave."""
        return _FAINT * self.recorded.largest

    def elsewhere(self, tiles: Tensor) -> Outcome:
        """The module alone on other tiles."""
        self.held.rewind()
        return self._run(self.original, tiles, watch=())

    def twice(self) -> tuple[dict[Any, Any], dict[Any, Any]]:
        """Plain attributes after one forward of the module alone, and after a second."""
        self.held.rewind()
        with torch.no_grad():
            attributes = []
            for _ in range(2):
                self.arguments.call(self.original, self.tiles.clone())
                attributes.append(self.held.attributes())
        return attributes[0], attributes[1]

    def writer(self) -> str:
        """The innermost sub-module of the module alone that changes the tiles in place first."""
        self.held.rewind()
        given, before, writers = self.tiles.clone(), dict[str, int](), list[str]()

        def enter(name: str, caller: str, tensors: list[Tensor]) -> None:
            before[name] = version_of(given)

        def leave(name: str, caller: str, tensors: list[Tensor]) -> None:
            if version_of(given) > before.get(name, version_of(given)):
                writers.append(name)

        with torch.no_grad(), Calls(self.held.names, self.held.module, enter, leave):
            self.arguments.call(self.original, given)
        return writers[0] if writers else ""

    # ------------------------------------------------------------------------------------------ one run

    def _run(
        self,
        forward: Callable[..., Any],
        tiles: Tensor,
        *,
        watch: tuple[AbstractContextManager[Any], ...],
        flip: bool = False,
        alone: bool = False,
    ) -> Outcome:
        with torch.set_grad_enabled(self.backward):
            leaf = tiles.detach().clone()
            wants_grad = self.backward and self.input_grad and leaf.is_floating_point()
            given = leaf.requires_grad_(wants_grad).clone()  # what is no leaf may be written to
            with ExitStack() as stack:
                for watcher in watch:
                    if isinstance(watcher, Reads):
                        watcher.mark(given)
                    stack.enter_context(watcher)
                out = self.arguments.call(forward, given)
            if self.by_tile and len(tiles):
                form_of(out, len(tiles), type(self.held.module).__name__)
            values: dict[str, Tensor | None] = {}
            outputs = tensors_of(out)
            if alone and self.backward:
                self._refuse_hidden(outputs, leaf)
            for index, tensor in enumerate(outputs):
                values[f"output {index}"] = self._kept(tensor, flip)
            if self.backward:
                values |= self._gradients(leaf if wants_grad else None, outputs, flip)
            values[INPUT_AFTER] = self._kept(given, flip)
        held = self.held
        state = {name: copied(tensor) for name, tensor in held.tensors().items()}
        return Outcome(values, state, held.attributes(), held.moved(), held.marks())

    def _gradients(self, leaf: Tensor | None, outputs: list[Tensor], flip: bool) -> dict[str, Tensor | None]:
        ends = [tensor for tensor in outputs if tensor.requires_grad]
        if not ends:
            return {}
        numbers = torch.Generator().manual_seed(7)
        weights = []
        for tensor in ends:
            weight = torch.randn(tensor.shape, generator=numbers).to(tensor.device, tensor.dtype)
            weights.append(self._turned(weight) if flip else weight)
        named = {name: p for name, p in self.held.module.named_parameters() if p.requires_grad}
        inputs = [*named.values(), *([] if leaf is None else [leaf])]
        if not inputs:
            return {}
        gradients = list(torch.autograd.grad(ends, inputs, weights, allow_unused=True))
        values: dict[str, Tensor | None] = {}
        if leaf is not None:
            gradient = gradients.pop()
            values["input gradient"] = None if gradient is None else self._kept(gradient, flip)
        for name, gradient in zip(named, gradients, strict=True):
            values[f"gradient of {name!r}"] = None if gradient is None else copied(gradient)
        return values

    def _refuse_hidden(self, outputs: list[Tensor], leaf: Tensor) -> None:
        """Refuse a tensor that the module trains and does not hold as a parameter: no chunk would differentiate it."""
        held_ids = {*self.held.parameters(), id(leaf)}
        for tensor in leaves_below(outputs):
            if id(tensor) not in held_ids:
                owner, what = self.held.holder_of(tensor)
                raise ForbiddenError(
                    f"{owner} must hold what it trains as parameters, got {what} {list(tensor.shape)}, which requires "
                    "a gradient and is none. HINT: register it, or its module, before partition_layers."
                )

    def _kept(self, tensor: Tensor, flip: bool) -> Tensor:
        return copied(self._turned(tensor) if flip else tensor)

    def _turned(self, tensor: Tensor) -> Tensor:
        """Tiles in the opposite order; a tile may have several rows."""
        count = len(self.tiles)
        if tensor.dim() == 0 or not count or tensor.shape[0] % count:
            return tensor
        return tensor.unflatten(0, (count, -1)).flip(0).flatten(0, 1)

    # ------------------------------------------------------------------------------------------ sub-modules

    def _compare(self, name: str, caller: str, tensors: list[Tensor]) -> None:
        """A sub-module's output of a chunk, with the part of any of its calls alone that it is nearest to."""
        self._note(name, tensors, [self.recorded.given[index][1] for index in self.recorded.by_name.get(name, ())])

    def _compare_reversed(self, name: str, caller: str, tensors: list[Tensor]) -> None:
        self._note(
            name,
            tensors,
            [
                [self._turned(tensor) for tensor in self.recorded.given[index][1]]
                for index in self.recorded.by_name.get(name, ())
            ],
        )

    def _note(self, name: str, tensors: list[Tensor], calls: list[list[Tensor]]) -> None:
        best: float | None = None
        for call in calls:
            if len(call) != len(tensors):
                continue
            pairs = [
                nearest(one, other.detach(), len(self.tiles) if self.by_tile else 0, self.faint)
                for one, other in zip(call, tensors, strict=True)
            ]
            gaps = [pair for pair in pairs if pair is not None]
            if gaps and (best is None or max(gaps) < best):
                best = max(gaps)
        if best is not None:
            self.apart[name] = max(best, self.apart.get(name, 0.0))

    def _known(self) -> list[int]:
        parts = [value for part in self.held.names for value in part.__dict__.values()]
        return [id(item) for item in (*self._adopted, *parts) if isinstance(item, torch.Generator)]


def leaves_below(outputs: list[Tensor]) -> list[Tensor]:
    """The tensors that autograd would hand a gradient, from the graphs of these."""
    waiting = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    leaves, seen = [], set(waiting)
    for node in waiting:  # grows
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            leaves.append(variable)
        for follower, _ in node.next_functions:
            if follower is not None and follower not in seen:
                seen.add(follower)
                waiting.append(follower)
    return leaves


def differences(one: Outcome, other: Outcome, faint: float) -> dict[str, float]:
    """How far the values of two runs are apart, as shares of each one's largest; outputs at least of `faint`."""
    largest = max(
        (size(value) for name, value in one.values.items() if "gradient of" in name and value is not None), default=0.0
    )
    gaps = {}
    for name, value in one.values.items():
        given = other.values.get(name)
        if value is None or given is None:
            missing = value if value is not None else given
            gaps[name] = 0.0 if missing is None or not size(missing) else float("inf")
        else:
            gaps[name] = distance(value, given, max(_SMALL * largest, _NOTHING) if "gradient" in name else faint)
    return gaps


def state_differences(one: Outcome, other: Outcome, start: dict[str, Tensor]) -> dict[str, float]:
    """The same of buffers, and of attributes that were tensors of one shape before, and after both."""
    gaps = {}
    for name, before in start.items():
        value, given = one.state.get(name), other.state.get(name)
        if value is not None and given is not None and value.shape == given.shape == before.shape:
            gaps[name] = distance(value, given, _NOTHING)
    return gaps


def left_behind(one: Outcome, other: Outcome, start: dict[str, Tensor], floor: float) -> list[str]:
    """Tensors that a run keeps in the module, new or of a new shape, and the other run does not, or not those."""
    names = []
    for name in {**one.state, **other.state}:
        values = [state.get(name) for state in (one.state, other.state)]
        shapes = {None if value is None else value.shape for value in (start.get(name), *values)}
        if len(shapes) == 1:
            continue  # see `state_differences`
        first, second = values
        if first is None or second is None or distance(first, second, _NOTHING) > floor:
            names.append(name)
    return names


def distance(one: Tensor, other: Tensor, least: float = 0.0) -> float:
    """The largest difference as a share of the largest value of `one`, or of `least`; NaN is equal to NaN."""
    if one.shape != other.shape:
        return float("inf")
    if not one.numel() or torch.equal(one, other):
        return 0.0
    if not (one.is_floating_point() or one.is_complex()):
        gap = (one.double() - other.double()).abs().max().item()
        return gap / max(size(one), 1.0)
    nowhere = one.isnan()
    if not torch.equal(nowhere, other.isnan()):
        return float("inf")
    gap = torch.where(nowhere | (one == other), torch.zeros_like(one), one - other).abs().max().item()
    return float(gap) / max(size(one), least, 1e-30)


def nearest(whole: Tensor, part: Tensor, tiles: int, least: float) -> float | None:
    """How far a chunk's tensor is from its part of the whole one, see `distance`; or None. 0 `tiles`: of rows."""
    if whole.dim() != part.dim() or whole.dtype != part.dtype:
        return None
    axes = [axis for axis in range(whole.dim()) if whole.shape[axis] != part.shape[axis]]
    part, least = part.to(whole.device), max(least, size(whole))
    if not axes:
        return distance(whole, part, least)
    total, length = whole.shape[axes[0]], part.shape[axes[0]]
    if not tiles:  # rows of images, with their halo
        places = set(range(total - length + 1)) if axes == [2] else set()
        return min((distance(whole.narrow(2, start, length), part, least) for start in places), default=None)
    if len(axes) > 1 or length > total or total % tiles or length % (total // tiles):
        return None
    places = {0, total - length}  # the first chunk, or the second
    return min(distance(whole.narrow(axes[0], start, length), part, least) for start in places)
