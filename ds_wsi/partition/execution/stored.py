"""A segment level by level, each level once over all chunks, and what backward needs of it kept."""

from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import GradientEdge

from ds_wsi.partition.execution.aliases import summed, trainable
from ds_wsi.partition.execution.chunk_pass import SegmentPasses, edges
from ds_wsi.partition.execution.chunked_tensor import Extent, Rows, Tiles
from ds_wsi.partition.execution.gradients import GradientSums
from ds_wsi.partition.execution.saved_on_host import move_to_host
from ds_wsi.partition.graph.segments import Chunk, Piece

_KEEP_GRAPHS = ("keep", "offload")
_KEEP_VALUES = ("lean", "stream")


class Hold:
    """One segment of one call in every mode but "recompute".

    Args:
        passes: over the segment's chunks.
        source: the segment's input.
        sums: that the parameters' gradients are added to.

    Attributes:
        values: that backward reads, but for the source: all stored ones in "lean" and "stream", the inputs of norms in
            "keep" and "offload".
        graphs: of "keep" and "offload": (piece, chunk) -> where gradient leaves autograd's graph, and where it enters.
        aliases: of the parameters, on which these graphs are built.
    """

    def __init__(self, passes: SegmentPasses, source: Extent, sums: GradientSums) -> None:
        self.passes, self.source, self.sums = passes, source, sums
        self.segment, self.parts, self.norms = passes.segment, passes.parts, passes.norms
        self.mode = self.segment.spec.mode
        self.values: dict[fx.Node, Extent] = {}
        self.graphs: dict[tuple[int, int], tuple[dict[fx.Node, GradientEdge], dict[fx.Node, GradientEdge]]] = {}
        self.aliases: dict[int, Tensor] = {}

    # ---------------------------------------------------------------------------------------------- forward

    def forward(self, out: Tiles | Rows, *, keep: bool) -> None:
        """Fill `out`; `keep`: backward will follow."""
        segment, chunks = self.segment, self.parts.chunks
        graph_kept = keep and self.mode in _KEEP_GRAPHS
        values: dict[fx.Node, Extent] = {segment.source: self.source}
        if segment.source in segment.norms_of:
            self._collect_source()
        self.norms.finish([segment.source])
        for index, piece in enumerate(segment.pieces):
            for target in piece.graph.targets:
                own = target is segment.target
                values[target] = out if own else self.parts.extent(target, host=self.mode == "stream")
            for position, chunk in enumerate(chunks):
                self.parts.prefetch(piece.graph, values, position + 1)
                results = (
                    self._keep_graph(index, chunk, values)
                    if graph_kept
                    else self.passes.run(piece.graph, chunk, values)
                )
                self._write(chunk, results, values)
                del results  # or they would live through the next chunk's peak
            self.norms.finish(piece.graph.targets)
            self._forget_read(index, values, keep=keep)
        self.norms.track()
        if keep:
            self._keep(values)
        else:
            self.source.clear()

    def _collect_source(self) -> None:
        source = self.segment.source
        for chunk in self.parts.chunks:
            part = self.source.read(self.parts.own(source, chunk))
            self.norms.collect(source, part, chunk)

    def _keep_graph(self, index: int, chunk: Chunk, values: dict[fx.Node, Extent]) -> dict[fx.Node, Tensor]:
        """As `SegmentPasses.run`, with autograd's graph kept."""
        leaves, results = self.passes.with_graph(self.segment.pieces[index].graph, chunk, values)
        self.graphs[index, chunk.index] = edges(leaves), edges(results)
        self.aliases = self.passes.tensors.aliases
        return results

    def _write(self, chunk: Chunk, results: dict[fx.Node, Tensor], values: dict[fx.Node, Extent]) -> None:
        for target, result in results.items():
            self.norms.collect(target, result, chunk)
            values[target].write(self.parts.own(target, chunk), result.detach())  # type: ignore[union-attr]

    def _forget_read(self, index: int, values: dict[fx.Node, Extent], *, keep: bool) -> None:
        """Free what no later piece reads, nor backward."""
        segment = self.segment
        held = keep and self.mode in _KEEP_VALUES
        graph_kept = keep and self.mode in _KEEP_GRAPHS
        for node, last in segment.readers.items():
            done = last <= index and node in values and node is not segment.source and node is not segment.target
            if done and not held and not (graph_kept and node in segment.norms_of):
                values.pop(node).clear()

    def _keep(self, values: dict[fx.Node, Extent]) -> None:
        """What the mode keeps stays."""
        if self.mode == "checkpoint":
            return
        segment = self.segment
        del values[segment.source]
        values.pop(segment.target, None)
        self.values = values
        if self.mode == "offload":
            move_to_host(self.values, self.parts)
        if self.mode in _KEEP_GRAPHS and segment.source not in segment.norms_of:
            self.source.clear()
            self.source = Tiles()  # the graphs hold what backward reads

    # --------------------------------------------------------------------------------------------- backward

    def backward(self, above: Extent, below: Tiles | Rows) -> None:
        """Fill `below`, the gradient of the segment's input, from `above`, its output's."""
        segment, chunks = self.segment, self.parts.chunks
        values = {segment.source: self.source, **self.values}
        if self.mode == "checkpoint":
            self._rebuild(values)
        gradients: dict[fx.Node, Extent] = {segment.target: above, segment.source: below}
        for index in reversed(range(len(segment.pieces))):
            piece = segment.pieces[index]
            for node in piece.graph.sources:
                if node not in gradients:
                    gradients[node] = self.parts.extent(node, host=self.mode == "stream")
            for position in reversed(range(len(chunks))):
                chunk = chunks[position]
                if not self.graphs:
                    self.parts.prefetch(piece.graph, values, position - 1)
                # What the next chunk's gradients are read from, or the link would stand still until they are.
                self.parts.prefetch_own(piece.graph.targets, gradients, position - 1)
                corrected = (node for node in piece.graph.targets if node in segment.norms_of)
                self.parts.prefetch_own(corrected, values, position - 1)
                grads = self._output_grads(piece, chunk, values, gradients)
                if grads:
                    self._piece_backward(index, chunk, values, gradients, grads)
            self.norms.conclude(piece.barriers, self.sums)
            for node in piece.graph.targets:
                # Read for the last time: earlier pieces compute other values.
                if node in values and node is not segment.source:
                    values.pop(node).clear()
                if node is not segment.target and node in gradients:
                    gradients.pop(node).clear()
        if segment.source in segment.norms_of and self.passes.needs_grad[segment.source]:
            self._correct_source(below)

    def _rebuild(self, values: dict[fx.Node, Extent]) -> None:
        """A checkpointed segment's lean values, but for its output."""
        for piece in self.segment.pieces:
            targets = [node for node in piece.graph.targets if node is not self.segment.target]
            if not targets:
                continue
            for target in targets:
                values[target] = self.parts.extent(target, host=False)
            for chunk in self.parts.chunks:
                results = self.passes.run(piece.graph, chunk, values)
                for target in targets:
                    values[target].write(self.parts.own(target, chunk), results[target])  # type: ignore[union-attr]

    def _output_grads(
        self, piece: Piece, chunk: Chunk, values: dict[fx.Node, Extent], gradients: dict[fx.Node, Extent]
    ) -> dict[fx.Node, Tensor]:
        """What flows to the chunk's targets, norm inputs corrected."""
        grads = {}
        for node in piece.graph.targets:
            if not self.passes.needs_grad[node]:
                continue
            where = self.parts.own(node, chunk)
            if where[0] == where[1] or node not in gradients:
                continue
            extent = gradients[node]
            empty = isinstance(extent, Rows) and extent.buffer is None and not extent.blocks.parts
            if empty or (isinstance(extent, Tiles) and not extent.parts):
                continue
            grad = extent.read(where)
            extent.drop(where) if isinstance(extent, Tiles) else None
            for norm in self.segment.norms_of.get(node, ()):
                grad = self.norms.correct(norm, chunk, values[node].read(where), grad)
            grads[node] = grad
        return grads

    def _piece_backward(
        self,
        index: int,
        chunk: Chunk,
        values: dict[fx.Node, Extent],
        gradients: dict[fx.Node, Extent],
        grads: dict[fx.Node, Tensor],
    ) -> None:
        piece = self.segment.pieces[index]
        kept = self.graphs.pop((index, chunk.index), None)
        if kept is None:
            # Of a final convolution the graph alone is needed; its result has its gradient's shape and dtype.
            leaves, results = self.passes.with_graph(piece.graph, chunk, values, known=grads)
            kept = edges(leaves), edges(results)
            del leaves, results
        self._differentiate(piece, chunk, *kept, grads, gradients)
        for node in piece.graph.targets:
            extent = values.get(node)
            if isinstance(extent, Tiles) and node is not self.segment.source:
                extent.drop(self.parts.own(node, chunk))

    def _differentiate(
        self,
        piece: Piece,
        chunk: Chunk,
        leaves: dict[fx.Node, GradientEdge],
        results: dict[fx.Node, GradientEdge],
        grads: dict[fx.Node, Tensor],
        gradients: dict[fx.Node, Extent],
    ) -> None:
        wanted = list(leaves)
        affine = self.norms.affine(piece.barriers, chunk)
        parameters, tensors = trainable(piece.graph.parameters, self.aliases or self.passes.tensors.aliases)
        outputs = [(results[node], grad) for node, grad in grads.items() if node in results]
        if not outputs:
            return
        inputs: list[Any] = [*(leaves[node] for node in wanted), *affine, *tensors]
        found = torch.autograd.grad(
            [output for output, _ in outputs],
            inputs,
            [grad for _, grad in outputs],
            allow_unused=True,
        )
        needed = self.parts.needed(piece.graph, chunk)
        for node, grad in zip(wanted, found, strict=False):
            if grad is not None:
                gradients[node].add(self.parts.reads(node, chunk, needed), grad)  # type: ignore[union-attr]
        end = len(wanted) + len(affine)
        reductions = found[len(wanted) : end]
        sums = summed(list(found[end:]))
        for norm, dgamma, dbeta in zip(piece.barriers, reductions[::2], reductions[1::2], strict=True):
            if dgamma is not None and dbeta is not None:
                self.norms.reduce(norm, chunk, dgamma, dbeta)
        del found, reductions
        self.sums.add(parameters, sums, [grad for _, grad in outputs])

    def _correct_source(self, below: Tiles | Rows) -> None:
        """Norms of the segment's input: their correction reaches it directly."""
        source = self.segment.source
        for chunk in self.parts.chunks:
            where = self.parts.own(source, chunk)
            fixed = self._source_correction(self.source.read(where), chunk)
            below.add(where, fixed)

    def _source_correction(self, z: Tensor, chunk: Chunk) -> Tensor:
        total = torch.zeros_like(z)
        for norm in self.segment.norms_of[self.segment.source]:
            total = self.norms.correct(norm, chunk, z, total)
        return total
