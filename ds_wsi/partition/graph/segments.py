"""A graph cut into segments, each with its mode, its levels and its chunks."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from ds_wsi.partition.graph.halo import Pointwise, Range, Window, image_of
from ds_wsi.partition.graph.norm import NormSite
from ds_wsi.partition.graph.subgraph import Subgraph, image_rules
from ds_wsi.partition.graph.trace import Traced, cut_candidates, levels
from ds_wsi.runtime.log import logger


@dataclass(frozen=True)
class SegmentSpec:
    """A segment as a plan names it.

    Args:
        last: the name of its last operation; "" for the module's output.
        mode: one of `MODES`.
        chunk_size: tiles per chunk, or rows of the segment's output.
        host_input: whether the segment's input is kept in host memory between forward and backward.
    """

    last: str
    mode: str
    chunk_size: int
    host_input: bool = False


@dataclass(frozen=True)
class Chunk:
    """One chunk of a segment's `count`.

    Attributes:
        tiles: the range of the batch's tiles that it has.
        population: the index of the population whose batch statistics its tiles share.
    """

    index: int
    count: int
    tiles: Range
    population: int = 0


@dataclass
class Level:
    """What one pass over the chunks computes: operations of one level, between stored values."""

    graph: Subgraph
    barriers: list[fx.Node] = field(default_factory=list)


class Segment:
    """Consecutive operations from one stored tensor to the next.

    Attributes:
        levels: one for each depth of norms, in order.
        prefixes: graphs from the segment's input to the norm inputs of each level, computed at once.
        whole: the graph from the segment's input to its output.
        sites: the norms with population statistics, in order of execution.
        norms_of: stored values -> norms that read them.
        in_rows: whether chunks are blocks of rows; otherwise tiles.
        undivided: whether it is computed in one chunk.
    """

    in_rows: bool

    def __init__(
        self, program: "Program", spec: SegmentSpec, source: fx.Node, target: fx.Node, nodes: list[fx.Node]
    ) -> None:
        self.source, self.target = source, target
        traced, rules = program.traced, program.rules
        first = source is traced.source or bool(program.segments[-1].in_rows)  # after the tail there are no rows
        self.in_rows = first and rules is not None and all(node in rules for node in nodes if node in traced.dependent)
        self.undivided = rules is not None and not self.in_rows
        self.spec = self._own(spec)
        barriers = {
            node: z
            for node, z in traced.barriers.items()
            if node in set(nodes) and not (self.undivided and not program.sites[node].batch)
        }
        sites = self.sites = {node: program.sites[node] for node in nodes if node in barriers}
        self.norms_of: dict[fx.Node, list[fx.Node]] = {}
        for node, z in barriers.items():
            self.norms_of.setdefault(z, []).append(node)
        depths = levels(nodes, barriers)
        stored = self._stored(nodes, depths, barriers, program.tensors)
        sub_rules = rules if self.in_rows else None

        def subgraph(sources: Any, targets: Any) -> Subgraph:
            heights = program.heights if self.in_rows else {}
            return Subgraph(traced, sources, targets, sites, sub_rules, heights)

        self.levels, self.prefixes = [], []
        available: list[fx.Node] = [source]
        for depth in range(max(depths.values(), default=0) + 1):
            targets = [node for node in stored if depths[node] == depth]
            inputs = [z for z in dict.fromkeys(barriers.values()) if depths.get(z, 0) == depth]
            self.levels.append(
                Level(subgraph(available, targets), [node for node in nodes if node in sites and depths[node] == depth])
            )
            self.prefixes.append(subgraph([source], inputs))
            available += targets
        self.whole = subgraph([source], [target])
        self.readers: dict[fx.Node, int] = {}  # stored value -> the last level that reads it
        for index, level in enumerate(self.levels):
            for node in level.graph.sources:
                self.readers[node] = index

    def with_spec(self, spec: SegmentSpec) -> "Segment":
        """The same operations as another spec computes them: its mode and chunks change nothing of the graphs."""
        other = copy(self)
        other.spec = self._own(spec)
        return other

    def _own(self, spec: SegmentSpec) -> SegmentSpec:
        if self.undivided and spec.mode == "recompute":
            # In one chunk a whole image's statistics are the module's own.
            return SegmentSpec(spec.last, "checkpoint", spec.chunk_size, spec.host_input)
        return spec

    def _stored(
        self,
        nodes: list[fx.Node],
        depths: dict[fx.Node, int],
        barriers: dict[fx.Node, fx.Node],
        tensors: set[fx.Node],
    ) -> list[fx.Node]:
        """Values that a later level reads, and the output."""
        inputs = set(barriers.values())
        return [
            node
            for node in nodes
            if node is self.target
            or node in inputs
            or (node in tensors and any(depths.get(user, -1) > depths[node] for user in node.users))
        ]

    def chunks(self, batch: int, bags: list[Range], height: int) -> list[Chunk]:
        """The chunks of a call on `batch` tiles, or images whose segment output is `height` rows high."""
        if self.undivided:
            return [Chunk(0, 1, (0, batch))]
        size = self.spec.chunk_size
        if self.in_rows:
            count = max(1, -(-height // size))
            return [Chunk(index, count, (0, batch)) for index in range(count)]
        ranges = [
            (first, last, population) for population, bag in enumerate(bags) for first, last in tile_ranges(bag, size)
        ]
        ranges = ranges or [(0, 0, 0)]  # a rank without a tile joins the norms' collectives
        return [Chunk(i, len(ranges), (first, last), population) for i, (first, last, population) in enumerate(ranges)]


_REMAINDERS = ContextVar("remainders of one tile", default=False)


@contextmanager
def leaving_remainders() -> Iterator[None]:
    """Let a single tile remain for a while: the check tries chunks of uneven sizes on few tiles."""
    token = _REMAINDERS.set(True)
    try:
        yield
    finally:
        _REMAINDERS.reset(token)


def tile_ranges(bag: Range, size: int) -> list[Range]:
    """The ranges of at most `size` tiles that a bag is cut into: full ones, and what remains.

    A single tile that would remain takes one more from the range before it: on one tile, libraries choose kernels by
    strides that say nothing, and torch's BatchNorm on a CPU (seen in 2.14.1) is then wrong in backward.
    """
    start, end = bag
    cuts = [*range(start, end, size), end]
    if size > 2 and len(cuts) > 2 and cuts[-1] - cuts[-2] == 1 and not _REMAINDERS.get():
        cuts[-2] -= 1
    return list(itertools.pairwise(cuts))


class Program:
    """A module's graph with its segments, for inputs of one shape in space (and any batch, on the batch axis).

    Args:
        traced: the graph.
        specs: the segments in order; cuts that this graph does not have are merged into the next.
        axis: "batch" or "spatial".
        shape: the input's shape.

    Raises:
        ValueError: the spatial axis, and not even the first operations work on rows; names them.
    """

    def __init__(
        self,
        traced: Traced,
        specs: tuple[SegmentSpec, ...],
        axis: str,
        shape: tuple[int, ...],
    ) -> None:
        self.traced = traced
        # What is the same for every chunk is computed where it is read: it is nothing to store.
        self.tensors = {node for node in traced.dependent if traced.opaque or isinstance(traced.values[node], Tensor)}
        self.sites = {node: NormSite(traced.leaves[node]) for node in traced.barriers}
        self.rules: dict[fx.Node, Pointwise | Window] | None = None
        self.heights: dict[fx.Node, int] = {}
        self.refused: dict[str, str] = {}
        if axis == "spatial":
            if len(shape) != 4:
                raise ValueError(f"a spatial partition's input must be images [B, C, H, W], got {list(shape)}")
            self.rules, self.refused = image_rules(traced)
            self.heights = {traced.source: shape[2]} | {
                node: image_of(traced.values[node]).shape[2] for node in self.rules
            }
        cuts = self._cuts(specs)
        self.segments: list[Segment] = []
        source, begin = traced.source, 0
        for spec, last in cuts:
            end = traced.nodes.index(last) + 1
            self.segments.append(Segment(self, spec, source, last, traced.nodes[begin:end]))
            source, begin = last, end

    def with_specs(self, specs: tuple[SegmentSpec, ...]) -> "Program":
        """The same segments, which must end where these do, in other modes and chunks."""
        other = copy(self)
        cuts = self._cuts(specs)
        other.segments = [segment.with_spec(spec) for segment, (spec, _) in zip(self.segments, cuts, strict=True)]
        return other

    def candidates(self) -> list[fx.Node]:
        """Where the graph may be cut, in order; on the spatial axis the native tail's cut is always one."""
        if self.traced.opaque:
            return []
        cuts = cut_candidates(self.traced, self.tensors)
        tail = self.tail_cut()
        if tail is not None:
            order = {node: index for index, node in enumerate(self.traced.nodes)}
            cuts = sorted({*(node for node in cuts if order[node] < order[tail]), tail}, key=order.__getitem__)
        return [node for node in cuts if node is not self.traced.target]

    def tail_cut(self) -> fx.Node | None:
        """The last point before the operations that rows cannot be partitioned through; None where there is none."""
        if self.rules is None:
            return None
        bad = [
            index
            for index, node in enumerate(self.traced.nodes)
            if node in self.traced.dependent and node not in self.rules
        ]
        if not bad:
            return None
        alive = {self.traced.source}
        last_use = {node: i for i, user in enumerate(self.traced.nodes) for node in user.all_input_nodes}
        cut = None
        for index, node in enumerate(self.traced.nodes[: bad[0]]):
            if node in self.traced.dependent:
                alive.add(node)
            alive = {item for item in alive if last_use.get(item, -1) > index}
            if alive == {node} and node not in self.traced.barriers.values():
                cut = node
        if cut is None:
            reasons = "; ".join(list(self.refused.values())[:3])
            raise ValueError(
                f"{type(self.traced.module).__name__} must begin with operations on rows to be partitioned in space, "
                f'got {reasons}. HINT: axis="batch", or partition the sub-module that holds the convolutions.'
            )
        return cut

    def _cuts(self, specs: tuple[SegmentSpec, ...]) -> list[tuple[SegmentSpec, fx.Node]]:
        names = {node.name: node for node in self.traced.nodes}
        cuts: list[tuple[SegmentSpec, fx.Node]] = []
        tail = self.tail_cut()
        order = {node: index for index, node in enumerate(self.traced.nodes)}
        merged = []
        for spec in specs:
            last = self.traced.target if spec.last == "" else names.get(spec.last)
            if last is None:
                merged.append(spec.last)
                continue
            previous = order[cuts[-1][1]] if cuts else -1
            if tail is not None and previous < order[tail] < order[last]:
                cuts.append((spec, tail))
            cuts.append((spec, last))
        if merged and not self.traced.opaque:
            logger.info("partition: this mode of %s has no %s; merged", type(self.traced.module).__name__, merged)
        return cuts
