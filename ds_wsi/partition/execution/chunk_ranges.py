"""The tiles or rows of each value that a chunk of a segment computes, and those that it reads."""

from collections.abc import Iterable

from torch import Tensor, fx

from ds_wsi.partition.execution.chunked_tensor import ChunkedTensor, RowBlocks, StoredTensor, TileChunks
from ds_wsi.partition.execution.host_store import HostStore
from ds_wsi.partition.graph.halo import Range
from ds_wsi.partition.graph.segments import Chunk, Segment
from ds_wsi.partition.graph.subgraph import Subgraph, hull


class ChunkRanges:
    """A segment's chunks in one call, and the parts of its values that belong to them.

    Args:
        segment: the segment whose values they are.
        heights: rows of every image of the program.
        batch: tiles, or images, of the call.
        bags: ranges of tiles that are a population each.
        store: the store for values in host memory.
    """

    def __init__(
        self, segment: Segment, heights: dict[fx.Node, int], batch: int, bags: list[Range], store: HostStore
    ) -> None:
        self.segment, self.heights, self.store = segment, heights, store
        self.chunks = segment.chunks(batch, bags, heights.get(segment.target, 0))

    def own(self, node: fx.Node, chunk: Chunk) -> Range:
        """The part of a value that the chunk alone computes: all chunks' parts make up the whole."""
        segment = self.segment
        if segment.in_rows:
            height = self.heights[node]
            return height * chunk.index // chunk.count, height * (chunk.index + 1) // chunk.count
        if segment.undivided and node is segment.source and node in self.heights:
            return 0, self.heights[node]
        return chunk.tiles

    def needed(self, graph: Subgraph, chunk: Chunk) -> dict[fx.Node, Range] | None:
        """The rows of every value that the chunk computes on the way to `graph`'s targets; None for tiles."""
        if not self.segment.in_rows:
            return None
        rows = {node: self._some_rows(node, chunk) for node in graph.targets}
        if self.segment.spec.mode == "recompute":
            # A norm's input is corrected by the chunk that owns it, which must therefore hold it.
            for norm in graph.barriers:
                (z,) = norm.all_input_nodes
                part = self._some_rows(z, chunk)
                rows[z] = hull(rows[z], part) if z in rows else part
        return graph.rows(rows)

    def reads(self, node: fx.Node, chunk: Chunk, needed: dict[fx.Node, Range] | None) -> Range:
        """The part of a source that the chunk reads."""
        return self.own(node, chunk) if needed is None else needed[node]

    def crop_own(self, node: fx.Node, value: Tensor, chunk: Chunk, needed: dict[fx.Node, Range] | None) -> Tensor:
        """A computed value without the rows that other chunks own."""
        if needed is None:
            return value
        (first, last), (low, high) = self.own(node, chunk), needed[node]
        return value if (first, last) == (low, high) else value[:, :, first - low : last - low]

    def make_value(self, node: fx.Node, *, host: bool, source: bool = False) -> StoredTensor:
        """An empty value, or gradient; `source`: it is the segment's input, which the segment before owns."""
        store = self.store if host else None
        in_rows = node in self.heights and (self.segment.in_rows or source)
        return RowBlocks(self.heights[node], store) if in_rows else TileChunks(store)

    def prefetch(self, graph: Subgraph, values: dict[fx.Node, ChunkedTensor], position: int) -> None:
        """Start bringing back from host memory what the chunk at `position` reads, if there is such a chunk."""
        if not 0 <= position < len(self.chunks):
            return
        chunk = self.chunks[position]
        needed = self.needed(graph, chunk)
        for node in graph.sources:
            value = values.get(node)
            if value is not None:
                value.prefetch(self.reads(node, chunk, needed))

    def prefetch_own(self, nodes: Iterable[fx.Node], values: dict[fx.Node, ChunkedTensor], position: int) -> None:
        """The same of the parts of values, or of gradients, that the chunk at `position` owns."""
        if not 0 <= position < len(self.chunks):
            return
        for node in nodes:
            value = values.get(node)
            if value is not None:
                value.prefetch(self.own(node, self.chunks[position]))

    def _some_rows(self, node: fx.Node, chunk: Chunk) -> Range:
        """The rows that a chunk owns, or one where it owns none: operations need a row to work on."""
        first, last = self.own(node, chunk)
        first = min(first, self.heights[node] - 1)
        return first, max(first + 1, last)
