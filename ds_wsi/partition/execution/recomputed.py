"""A segment computed anew from its input in every pass: nothing of it is kept but the input and the statistics."""

from torch import fx

from ds_wsi.partition.execution.aliases import summed, trainable
from ds_wsi.partition.execution.chunk_pass import ChunkRunner
from ds_wsi.partition.execution.chunked_tensor import ChunkedTensor, StoredTensor
from ds_wsi.partition.execution.gradients import GradientSums


class RecomputedSegment:
    """One segment of one call in mode "recompute".

    Args:
        runner: what runs the segment's chunks.
        source: the segment's input.
        sums: what the parameters' gradients are added to.
    """

    def __init__(self, runner: ChunkRunner, source: ChunkedTensor, sums: GradientSums) -> None:
        self.runner, self.source, self.sums = runner, source, sums
        self.segment, self.ranges, self.norms = runner.segment, runner.ranges, runner.norms

    def forward(self, out: StoredTensor, *, keep: bool) -> None:
        """Fill `out`: one pass for each level of norms, one for the output; `keep`: backward will follow."""
        segment, chunks = self.segment, self.ranges.chunks
        values: dict[fx.Node, ChunkedTensor] = {segment.source: self.source}
        for prefix in segment.prefixes:
            if prefix.targets:
                for position, chunk in enumerate(chunks):
                    self.ranges.prefetch(prefix, values, position + 1)
                    for target, result in self.runner.run(prefix, chunk, values).items():
                        self.norms.collect(target, result, chunk)
                self.norms.finish(prefix.targets)
        for position, chunk in enumerate(chunks):
            self.ranges.prefetch(segment.whole, values, position + 1)
            results = self.runner.run(segment.whole, chunk, values)
            out.write(self.ranges.own(segment.target, chunk), results[segment.target])
        self.norms.track()
        if not keep:
            self.source.clear()

    def backward(self, output_grad: ChunkedTensor, input_grad: StoredTensor) -> None:
        """Fill `input_grad`, the gradient of the segment's input, from `output_grad`.

        One pass for the reductions of each level of norms, the last level first, one for all gradients.
        """
        values: dict[fx.Node, ChunkedTensor] = {self.segment.source: self.source}
        corrected: set[fx.Node] = set()  # norms whose corrections are known
        for level in reversed(self.segment.levels):
            if not level.barriers:
                continue
            self._reduce(level.barriers, output_grad, values, corrected)
            self.norms.conclude(level.barriers, self.sums)
            corrected |= set(level.barriers)
        self._differentiate(output_grad, input_grad, values, corrected)

    def _reduce(
        self,
        norms: list[fx.Node],
        output_grad: ChunkedTensor,
        values: dict[fx.Node, ChunkedTensor],
        corrected: set[fx.Node],
    ) -> None:
        """The two sums of these norms over all chunks, those of all later norms being corrected."""
        segment = self.segment
        chunks = self.ranges.chunks
        for position in reversed(range(len(chunks))):
            chunk = chunks[position]
            self.ranges.prefetch(segment.whole, values, position - 1)
            grad = output_grad.read(self.ranges.own(segment.target, chunk))
            graph = self.runner.with_graph(segment.whole, chunk, values, corrected=corrected)
            affine = self.norms.affine(norms, chunk)
            reductions = graph.gradients([(segment.target, grad)], [], norms, affine)
            for norm, dgamma, dbeta in zip(norms, reductions[::2], reductions[1::2], strict=True):
                if dgamma is not None and dbeta is not None:
                    self.norms.reduce(norm, chunk, dgamma, dbeta)
            graph.forget()
            del grad

    def _differentiate(
        self,
        output_grad: ChunkedTensor,
        input_grad: StoredTensor,
        values: dict[fx.Node, ChunkedTensor],
        corrected: set[fx.Node],
    ) -> None:
        """The gradients of the input and of the parameters."""
        segment, chunks = self.segment, self.ranges.chunks
        parameters, tensors = trainable(segment.whole.parameters, self.runner.tensors.aliases)
        wants_input = self.runner.needs_grad[segment.source]
        if not parameters and not wants_input:
            return
        for position in reversed(range(len(chunks))):
            chunk = chunks[position]
            self.ranges.prefetch(segment.whole, values, position - 1)
            grad = output_grad.read(self.ranges.own(segment.target, chunk))
            graph = self.runner.with_graph(segment.whole, chunk, values, corrected=corrected)
            sources = [segment.source] if wants_input else []
            outputs = [(segment.target, grad.to(graph.results[segment.target].dtype))]
            gradients = graph.gradients(outputs, sources, [], tensors)
            del outputs
            if wants_input and gradients[0] is not None:
                needed = self.ranges.needed(segment.whole, chunk)
                input_grad.add(self.ranges.reads(segment.source, chunk, needed), gradients[0])
            sums = summed(gradients[len(sources) :], len(parameters))
            del gradients, graph
            self.sums.add(parameters, sums, [grad])
            del grad  # or they would live through the next chunk's peak
