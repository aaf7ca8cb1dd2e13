"""A segment level by level, each level once over all chunks, and what backward needs of it kept."""

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from ds_wsi.partition.execution.aliases import summed, trainable
from ds_wsi.partition.execution.chunk_pass import ChunkGraph, ChunkRunner
from ds_wsi.partition.execution.chunked_tensor import ChunkedTensor, StoredTensor, TileChunks
from ds_wsi.partition.execution.gradients import GradientSums
from ds_wsi.partition.execution.saved_on_host import move_to_host
from ds_wsi.partition.graph.segments import Chunk, Level

KEEP_GRAPHS = ("keep", "offload")  # modes whose graphs compare versions themselves
_KEEP_VALUES = ("lean", "stream")


class StoredSegment:
    """One segment of one call in every mode but "recompute".

    Args:
        runner: what runs the segment's chunks.
        source: the segment's input.
        sums: what the parameters' gradients are added to.

    Attributes:
        values: what backward reads, but for the source: all stored values in "lean" and "stream", the inputs of norms
            in "keep" and "offload".
        graphs: the graphs of "keep" and "offload", by (level, chunk).
        aliases: the parameters' aliases, on which these graphs are built.
    """

    def __init__(self, runner: ChunkRunner, source: ChunkedTensor, sums: GradientSums) -> None:
        self.runner, self.source, self.sums = runner, source, sums
        self.segment, self.ranges, self.norms = runner.segment, runner.ranges, runner.norms
        self.mode = self.segment.spec.mode
        self.values: dict[fx.Node, ChunkedTensor] = {}
        self.graphs: dict[tuple[int, int], ChunkGraph] = {}
        self.aliases: dict[int, Tensor] = {}

    # ---------------------------------------------------------------------------------------------- forward

    def forward(self, out: StoredTensor, *, keep: bool) -> None:
        """Fill `out`; `keep`: backward will follow."""
        segment, chunks = self.segment, self.ranges.chunks
        graph_kept = keep and self.mode in KEEP_GRAPHS
        values: dict[fx.Node, ChunkedTensor] = {segment.source: self.source}
        if segment.source in segment.norms_of:
            self._collect_source()
        self.norms.finish([segment.source])
        for index, level in enumerate(segment.levels):
            written = {
                target: out if target is segment.target else self.ranges.make_value(target, host=self.mode == "stream")
                for target in level.graph.targets
            }
            values |= written
            for position, chunk in enumerate(chunks):
                self.ranges.prefetch(level.graph, values, position + 1)
                results = (
                    self._keep_graph(index, chunk, values)
                    if graph_kept
                    else self.runner.run(level.graph, chunk, values)
                )
                self._write(chunk, results, written)
                del results  # or they would live through the next chunk's peak
            self.norms.finish(level.graph.targets)
            self._forget_read(index, values, keep=keep)
        self.norms.track()
        if keep:
            self._keep(values)
        else:
            self.source.clear()

    def _collect_source(self) -> None:
        source = self.segment.source
        for chunk in self.ranges.chunks:
            part = self.source.read(self.ranges.own(source, chunk))
            self.norms.collect(source, part, chunk)

    def _keep_graph(self, index: int, chunk: Chunk, values: dict[fx.Node, ChunkedTensor]) -> dict[fx.Node, Tensor]:
        """Do what `ChunkRunner.run` does, with autograd's graph kept."""
        graph = self.graphs[index, chunk.index] = self.runner.with_graph(
            self.segment.levels[index].graph, chunk, values
        )
        results = graph.results
        graph.let_go()
        self.aliases = self.runner.tensors.aliases
        return results

    def _write(self, chunk: Chunk, results: dict[fx.Node, Tensor], written: Mapping[fx.Node, StoredTensor]) -> None:
        for target, result in results.items():
            self.norms.collect(target, result, chunk)
            written[target].write(self.ranges.own(target, chunk), result.detach())

    def _forget_read(self, index: int, values: dict[fx.Node, ChunkedTensor], *, keep: bool) -> None:
        """Free what no later level reads, nor backward."""
        segment = self.segment
        held = keep and self.mode in _KEEP_VALUES
        graph_kept = keep and self.mode in KEEP_GRAPHS
        for node, last in segment.readers.items():
            done = last <= index and node in values and node is not segment.source and node is not segment.target
            if done and not held and not (graph_kept and node in segment.norms_of):
                values.pop(node).clear()

    def _keep(self, values: dict[fx.Node, ChunkedTensor]) -> None:
        """What the mode keeps stays."""
        if self.mode == "checkpoint":
            return
        segment = self.segment
        del values[segment.source]
        values.pop(segment.target, None)
        self.values = values
        if self.mode == "offload":
            move_to_host(self.values, self.ranges)
        if self.mode in KEEP_GRAPHS and segment.source not in segment.norms_of:
            self.source.clear()
            self.source = TileChunks()  # the graphs hold what backward reads

    # --------------------------------------------------------------------------------------------- backward

    def backward(self, output_grad: ChunkedTensor, input_grad: StoredTensor) -> None:
        """Fill `input_grad`, the gradient of the segment's input, from `output_grad`."""
        segment, chunks = self.segment, self.ranges.chunks
        values = {segment.source: self.source, **self.values}
        if self.mode == "checkpoint":
            self._rebuild(values)
        gradients: dict[fx.Node, ChunkedTensor] = {segment.target: output_grad, segment.source: input_grad}
        summed_up: dict[fx.Node, StoredTensor] = {segment.source: input_grad}  # of these gradients, what chunks add to
        for index in reversed(range(len(segment.levels))):
            level = segment.levels[index]
            for node in level.graph.sources:
                if node not in gradients:
                    gradients[node] = summed_up[node] = self.ranges.make_value(node, host=self.mode == "stream")
            for position in reversed(range(len(chunks))):
                chunk = chunks[position]
                if not self.graphs:
                    self.ranges.prefetch(level.graph, values, position - 1)
                # What the next chunk's gradients are read from, or the link would stand still until they are.
                self.ranges.prefetch_own(level.graph.targets, gradients, position - 1)
                corrected = (node for node in level.graph.targets if node in segment.norms_of)
                self.ranges.prefetch_own(corrected, values, position - 1)
                grads = self._output_grads(level, chunk, values, gradients)
                if grads:
                    self._level_backward(index, chunk, values, summed_up, grads)
            self.norms.conclude(level.barriers, self.sums)
            for node in level.graph.targets:
                # Read for the last time: earlier levels compute other values.
                if node in values and node is not segment.source:
                    values.pop(node).clear()
                if node is not segment.target and node in gradients:
                    summed_up.pop(node, None)
                    gradients.pop(node).clear()
        if segment.source in segment.norms_of and self.runner.needs_grad[segment.source]:
            self._correct_source(input_grad)

    def _rebuild(self, values: dict[fx.Node, ChunkedTensor]) -> None:
        """A checkpointed segment's lean values, but for its output."""
        for level in self.segment.levels:
            targets = [node for node in level.graph.targets if node is not self.segment.target]
            if not targets:
                continue
            rebuilt = {target: self.ranges.make_value(target, host=False) for target in targets}
            values |= rebuilt
            for chunk in self.ranges.chunks:
                results = self.runner.run(level.graph, chunk, values)
                for target in targets:
                    rebuilt[target].write(self.ranges.own(target, chunk), results[target])

    def _output_grads(
        self, level: Level, chunk: Chunk, values: dict[fx.Node, ChunkedTensor], gradients: dict[fx.Node, ChunkedTensor]
    ) -> dict[fx.Node, Tensor]:
        """What flows to the chunk's targets, norm inputs corrected."""
        grads = {}
        for node in level.graph.targets:
            if not self.runner.needs_grad[node]:
                continue
            where = self.ranges.own(node, chunk)
            if where[0] == where[1] or node not in gradients:
                continue
            gradient = gradients[node]
            if gradient.is_empty:
                continue
            grad = gradient.read(where)
            gradient.drop(where)
            for norm in self.segment.norms_of.get(node, ()):
                grad = self.norms.correct(norm, chunk, values[node].read(where), grad)
            grads[node] = grad
        return grads

    def _level_backward(
        self,
        index: int,
        chunk: Chunk,
        values: dict[fx.Node, ChunkedTensor],
        summed_up: dict[fx.Node, StoredTensor],
        grads: dict[fx.Node, Tensor],
    ) -> None:
        level = self.segment.levels[index]
        kept = self.graphs.pop((index, chunk.index), None)
        if kept is None:
            # Of a final convolution the graph alone is needed; its result has its gradient's shape and dtype.
            kept = self.runner.with_graph(level.graph, chunk, values, known=grads)
            kept.let_go()
        self._differentiate(level, chunk, kept, grads, summed_up)
        for node in level.graph.targets:
            if node in values and node is not self.segment.source:
                values[node].drop(self.ranges.own(node, chunk))

    def _differentiate(
        self,
        level: Level,
        chunk: Chunk,
        graph: ChunkGraph,
        grads: dict[fx.Node, Tensor],
        summed_up: dict[fx.Node, StoredTensor],
    ) -> None:
        sources = list(graph.leaves)
        affine = self.norms.affine(level.barriers, chunk)
        parameters, tensors = trainable(level.graph.parameters, self.aliases or self.runner.tensors.aliases)
        outputs = [(node, grad) for node, grad in grads.items() if node in graph.results]
        if not outputs:
            return
        gradients = graph.gradients(outputs, sources, level.barriers, [*affine, *tensors])
        needed = self.ranges.needed(level.graph, chunk)
        for node, grad in zip(sources, gradients, strict=False):
            if grad is not None:
                summed_up[node].add(self.ranges.reads(node, chunk, needed), grad)
        end = len(sources) + len(affine)
        reductions = gradients[len(sources) : end]
        sums = summed(gradients[end:], len(parameters))
        for norm, dgamma, dbeta in zip(level.barriers, reductions[::2], reductions[1::2], strict=True):
            if dgamma is not None and dbeta is not None:
                self.norms.reduce(norm, chunk, dgamma, dbeta)
        del gradients, reductions
        self.sums.add(parameters, sums, [grad for _, grad in outputs])

    def _correct_source(self, input_grad: StoredTensor) -> None:
        """Norms of the segment's input: their correction reaches it directly."""
        source = self.segment.source
        for chunk in self.ranges.chunks:
            where = self.ranges.own(source, chunk)
            fixed = self._source_correction(self.source.read(where), chunk)
            input_grad.add(where, fixed)

    def _source_correction(self, z: Tensor, chunk: Chunk) -> Tensor:
        total = torch.zeros_like(z)
        for norm in self.segment.norms_of[self.segment.source]:
            total = self.norms.correct(norm, chunk, z, total)
        return total
