"""One chunk through a part of a segment's graph: without gradient, or with autograd's graph."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ds_wsi.partition.execution.aliases import CallTensors
from ds_wsi.partition.execution.chunk_ranges import ChunkRanges
from ds_wsi.partition.execution.chunked_tensor import ChunkedTensor
from ds_wsi.partition.execution.segment_norms import SegmentNorms
from ds_wsi.partition.graph.halo import Range
from ds_wsi.partition.graph.replay import Random
from ds_wsi.partition.graph.segments import Chunk, Segment
from ds_wsi.partition.graph.subgraph import Subgraph
from ds_wsi.partition.module.arguments import Arguments


@dataclass(frozen=True)
class ChunkRunner:
    """What every pass over the chunks of one segment needs in one call.

    Args:
        segment: the segment that is computed.
        ranges: the segment's chunks, and what each reads and computes.
        norms: the segment's norms, whose statistics the passes apply.
        random: the call's random numbers.
        needs_grad: whether a gradient has to reach each value.
        saving: makes the context in which autograd's graphs are built.
        arguments: the call's arguments beside the tiles.
        tensors: the call's parameters.
    """

    segment: Segment
    ranges: ChunkRanges
    norms: SegmentNorms
    random: Random
    needs_grad: dict[fx.Node, bool]
    saving: Callable[[], AbstractContextManager[Any]]
    arguments: Arguments
    tensors: CallTensors

    def run(self, graph: Subgraph, chunk: Chunk, values: dict[fx.Node, ChunkedTensor]) -> dict[fx.Node, Tensor]:
        """The targets' own tiles or rows of a chunk, without gradient."""
        ranges = self.ranges
        with torch.no_grad(), no_checkpoint():
            needed = ranges.needed(graph, chunk)
            inputs = {node: values[node].read(ranges.reads(node, chunk, needed)) for node in graph.sources}
            return self.results(graph, chunk, inputs, needed)

    def results(
        self, graph: Subgraph, chunk: Chunk, inputs: dict[fx.Node, Tensor], needed: dict[fx.Node, Range] | None
    ) -> dict[fx.Node, Tensor]:
        """What `run` returns, from what the chunk reads; `inputs` is emptied as it is used."""
        norms, key = self.norms.of(chunk), self._key(chunk)
        results = graph.run(inputs, norms, self.random, key, _count(chunk), self.arguments, needed=needed)
        return {node: self.ranges.crop_own(node, value, chunk, needed) for node, value in results.items()}

    def with_graph(
        self,
        graph: Subgraph,
        chunk: Chunk,
        values: dict[fx.Node, ChunkedTensor],
        *,
        corrected: set[fx.Node] | None = None,
        known: dict[fx.Node, Tensor] | None = None,
    ) -> "ChunkGraph":
        """A chunk's graph, with the targets' own tiles or rows on top of it.

        Args:
            graph: the part of the segment's graph to compute.
            chunk: one of the segment's.
            values: the tensors that hold the sources.
            corrected: norms whose input's gradient is corrected inside the graph.
            known: results of final convolutions that need not be computed again.
        """
        ranges = self.ranges
        with torch.enable_grad(), self.saving():
            needed = ranges.needed(graph, chunk)
            inputs = {node: values[node].read(ranges.reads(node, chunk, needed)) for node in graph.sources}
            owned_rows = None
            if corrected is not None:
                owned_rows = {
                    node: ranges.own(node.all_input_nodes[0], chunk) if self.segment.in_rows else None
                    for node in corrected
                }
            return self.graph(graph, chunk, inputs, needed, owned_rows, known)

    def graph(
        self,
        graph: Subgraph,
        chunk: Chunk,
        inputs: dict[fx.Node, Tensor],
        needed: dict[fx.Node, Range] | None,
        corrected: dict[fx.Node, Range | None] | None,
        known: dict[fx.Node, Tensor] | None,
    ) -> "ChunkGraph":
        """What `with_graph` returns, from what the chunk reads; `inputs` is emptied."""
        leaves = {}
        anchor = torch.empty(0, requires_grad=True)
        for node in graph.sources:
            value = inputs.pop(node).detach()
            differentiated = (value.is_floating_point() or value.is_complex()) and self.needs_grad[node]
            leaves[node] = _Source.apply(anchor, value) if differentiated else value
        results = graph.run(
            dict(leaves),
            self.norms.of(chunk),
            self.random,
            self._key(chunk),
            _count(chunk),
            self.arguments,
            needed=needed,
            corrected=corrected,
            known=known,
        )
        results = {node: self.ranges.crop_own(node, value, chunk, needed) for node, value in results.items()}
        return ChunkGraph(leaves, results)

    def _key(self, chunk: Chunk) -> Any:
        """The chunk's name among the call's random numbers."""
        return self.segment.target, chunk.index


def _count(chunk: Chunk) -> int:
    return chunk.tiles[1] - chunk.tiles[0]


def no_checkpoint() -> AbstractContextManager[Any]:
    """Refuses checkpoints within the module: what they would recompute is recomputed already."""
    return torch.autograd.graph.disable_saved_tensors_hooks(
        "a partitioned module must not checkpoint inside a partition, got hooks on saved tensors while it ran. "
        'HINT: switch its checkpointing off; mode "checkpoint" does the same, exactly.'
    )


class ChunkGraph:
    """Autograd's graph of one chunk.

    Args:
        leaves: what the chunk reads: where gradient leaves the graph.
        results: the values of its targets: where gradient enters.

    Attributes:
        leaves, results: the same, or edges of the graph after `let_go`.
    """

    def __init__(self, leaves: dict[fx.Node, Tensor], results: dict[fx.Node, Tensor]) -> None:
        self.leaves: dict[fx.Node, Any] = leaves
        self.results: dict[fx.Node, Any] = results

    def let_go(self) -> None:
        """Hold the graph alone, of what gradient reaches: the tensors would stay on the device."""
        self.leaves, self.results = edges(self.leaves), edges(self.results)

    def forget(self) -> None:
        """Hold the leaves alone."""
        self.results = {}

    def gradients(
        self, outputs: list[tuple[fx.Node, Tensor]], sources: list[fx.Node], norms: list[fx.Node], beside: list[Tensor]
    ) -> list[Tensor | None]:
        """The gradients of some leaves, then of other tensors.

        Args:
            outputs: targets with what flows into each.
            sources: the leaves.
            norms: norms whose gamma and beta are the first of `beside`.
            beside: those, and the tensors of `trainable` for the graph's parameters, or nothing more.
        """
        targets = [self.results[node] for node, _ in outputs]
        inputs = [*(self.leaves[node] for node in sources), *beside]
        return list(torch.autograd.grad(targets, inputs, [grad for _, grad in outputs], allow_unused=True))


def edges(values: dict[fx.Node, Tensor]) -> dict[fx.Node, GradientEdge]:
    """Where gradient enters or leaves a graph, without the tensors, which would stay on the device."""
    return {node: get_gradient_edge(value) for node, value in values.items() if value.requires_grad}


class _Source(torch.autograd.Function):
    """A value as the beginning of a graph that does not hold it, as a leaf would."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None
