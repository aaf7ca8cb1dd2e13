"""Numbers of a recorded forward that depend on how many tiles there are, told by two recordings of it."""

from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_aggregate

from ds_wsi.partition.graph.record import Recording

FEW, MORE = 4, 6  # tiles of the two runs by which numbers that depend on their count are told
NAMED, MANY = 16, 1001  # up to so many the count itself is tried, for all others one that is odd and large


class Size:
    """A number that depends on how many tiles there are: `each` per tile, and `more`."""

    def __init__(self, each: int, more: int) -> None:
        self.each, self.more = each, more

    def of(self, tiles: int) -> int:
        """The number for a chunk."""
        return self.each * tiles + self.more

    def __repr__(self) -> str:
        """The number as a graph's listing shows it."""
        return f"{self.each} tiles + {self.more}"


def join(one: Recording, other: Recording, owner: str, tiles: int = MORE) -> None:
    """Write into `one` the sizes that depend on the number of tiles, by what they are in `other`.

    Args:
        one: the recording of `FEW` tiles.
        other: the recording of another number of tiles.
        owner: the module's class, for errors.
        tiles: the number of tiles of `other`; where it is not `MORE`, `one` has its sizes and is compared alone.

    Raises:
        ValueError: the operations themselves depend on it.
    """
    rule = f"{owner} must do the same with any number of tiles, got"
    if len(one.graph.nodes) != len(other.graph.nodes):
        counts = f"{len(one.graph.nodes)} operations for {FEW} and {len(other.graph.nodes)} for {tiles}"
        raise ValueError(f"{rule} {counts}. HINT: partition the part without it.")
    mates = dict(zip(other.graph.nodes, one.graph.nodes, strict=True))
    for mate, node in mates.items():
        try:
            if node.op != mate.op or _function(node) != _function(mate):
                raise _OtherwiseError(node.name, mate.name)
            node.args, node.kwargs = (
                _joint(node, few, some, mates, tiles)
                for few, some in ((node.args, mate.args), (node.kwargs, mate.kwargs))
            )
            _require_rows(one.values.get(node), other.values.get(mate), tiles)
        except _OtherwiseError as error:
            first, second = error.args
            raise ValueError(
                f"{rule} {first!r} for {FEW} and {second!r} for {tiles} in {node.name!r} of "
                f"{node.meta.get('module')!r}. HINT: partition the part without it."
            ) from None
    if one.form.leaves != other.form.leaves:
        raise ValueError(
            f"{rule} an output of {one.form.words} for {FEW} tiles, and of {other.form.words} for {tiles}. "
            "HINT: partition the part that returns features of tiles."
        )


class _OtherwiseError(Exception):
    """What an operation has in one recording, and in the other."""


def _joint(node: fx.Node, first: Any, second: Any, mates: dict[fx.Node, fx.Node], tiles: int) -> Any:
    """A node's argument for any number of tiles, from those of two recordings."""
    if isinstance(second, fx.Node):
        second = mates.get(second)
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)) and len(first) == len(second):
        items = [_joint(node, *pair, mates, tiles) for pair in zip(first, second, strict=True)]
        return tuple(items) if isinstance(first, tuple) else items
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return {key: _joint(node, first[key], second[key], mates, tiles) for key in first}
    if isinstance(first, slice) and isinstance(second, slice):
        pairs = ((first.start, second.start), (first.stop, second.stop), (first.step, second.step))
        return slice(*(_joint(node, *pair, mates, tiles) for pair in pairs))
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first
    if isinstance(first, Size):
        if first.of(tiles) != second:
            raise _OtherwiseError(first.of(FEW), second)
        return first
    if tiles == MORE and type(first) is int and type(second) is int and first != second:
        each, rest = divmod(second - first, MORE - FEW)
        if rest == 0:
            node.meta["sized"] = True
            return Size(each, first - each * FEW)
    if type(first) is not type(second) or first != second:
        raise _OtherwiseError(first, second)
    return first


def _require_rows(few: Any, some: Any, tiles: int) -> None:
    """Refuse a result that has neither as many rows for any number of tiles, nor as many per tile.

    The first five tiles of a call, say, would be the first five of every chunk.
    """
    one, other = list(getattr(few, "shape", ())), list(getattr(some, "shape", ()))
    if any(first != second and first * tiles != second * FEW for first, second in zip(one, other, strict=False)):
        raise _OtherwiseError(one, other)


def _function(node: fx.Node) -> Any:
    return str(node.target) if node.op != "call_function" else getattr(node.target, "__name__", node.target)


def resolved(arguments: Any, tiles: int) -> Any:
    """A node's arguments with the sizes of a chunk of this many tiles."""
    return map_aggregate(arguments, lambda item: item.of(tiles) if isinstance(item, Size) else item)
