"""A segment computed anew from its input in every pass: nothing of it is kept but the input and the statistics."""

import torch
from torch import fx

from ds_wsi.partition.execution.aliases import summed, trainable
from ds_wsi.partition.execution.chunk_pass import SegmentPasses
from ds_wsi.partition.execution.chunked_tensor import Extent, Rows, Tiles
from ds_wsi.partition.execution.gradients import GradientSums


class Recompute:
    """One segment of one call in mode "recompute".

    Args:
        passes: over the segment's chunks.
        source: the segment's input.
        sums: that the parameters' gradients are added to.
    """

    def __init__(self, passes: SegmentPasses, source: Extent, sums: GradientSums) -> None:
        self.passes, self.source, self.sums = passes, source, sums
        self.segment, self.parts, self.norms = passes.segment, passes.parts, passes.norms

    def forward(self, out: Tiles | Rows, *, keep: bool) -> None:
        """Fill `out`: one pass for each level of norms, one for the output; `keep`: backward will follow."""
        segment, chunks = self.segment, self.parts.chunks
        values: dict[fx.Node, Extent] = {segment.source: self.source}
        for prefix in segment.prefixes:
            if prefix.targets:
                for position, chunk in enumerate(chunks):
                    self.parts.prefetch(prefix, values, position + 1)
                    for target, result in self.passes.run(prefix, chunk, values).items():
                        self.norms.collect(target, result, chunk)
                self.norms.finish(prefix.targets)
        for position, chunk in enumerate(chunks):
            self.parts.prefetch(segment.whole, values, position + 1)
            results = self.passes.run(segment.whole, chunk, values)
            out.write(self.parts.own(segment.target, chunk), results[segment.target])
        self.norms.track()
        if not keep:
            self.source.clear()

    def backward(self, above: Extent, below: Tiles | Rows) -> None:
        """Fill `below`, the gradient of the segment's input, from `above`, its output's.

        One pass for the reductions of each level of norms, the last level first, one for all gradients.
        """
        values: dict[fx.Node, Extent] = {self.segment.source: self.source}
        corrected: set[fx.Node] = set()  # norms whose corrections are known
        for piece in reversed(self.segment.pieces):
            if not piece.barriers:
                continue
            self._reduce(piece.barriers, above, values, corrected)
            self.norms.conclude(piece.barriers, self.sums)
            corrected |= set(piece.barriers)
        self._differentiate(above, below, values, corrected)

    def _reduce(
        self, norms: list[fx.Node], above: Extent, values: dict[fx.Node, Extent], corrected: set[fx.Node]
    ) -> None:
        """The two sums of these norms over all chunks, those of all later norms being corrected."""
        segment = self.segment
        chunks = self.parts.chunks
        for position in reversed(range(len(chunks))):
            chunk = chunks[position]
            self.parts.prefetch(segment.whole, values, position - 1)
            grad = above.read(self.parts.own(segment.target, chunk))
            _, results = self.passes.with_graph(segment.whole, chunk, values, corrected=corrected)
            leaves = self.norms.affine(norms, chunk)
            found = torch.autograd.grad([results[segment.target]], leaves, [grad], allow_unused=True)
            for norm, dgamma, dbeta in zip(norms, found[::2], found[1::2], strict=True):
                if dgamma is not None:
                    self.norms.reduce(norm, chunk, dgamma, dbeta)
            del results, grad

    def _differentiate(
        self, above: Extent, below: Tiles | Rows, values: dict[fx.Node, Extent], corrected: set[fx.Node]
    ) -> None:
        """The gradients of the input and of the parameters."""
        segment, chunks = self.segment, self.parts.chunks
        parameters, tensors = trainable(segment.whole.parameters, self.passes.tensors.aliases)
        wants_input = self.passes.needs_grad[segment.source]
        if not parameters and not wants_input:
            return
        for position in reversed(range(len(chunks))):
            chunk = chunks[position]
            self.parts.prefetch(segment.whole, values, position - 1)
            grad = above.read(self.parts.own(segment.target, chunk))
            leaves, results = self.passes.with_graph(segment.whole, chunk, values, corrected=corrected)
            inputs = [leaves[segment.source]] if wants_input else []
            found = torch.autograd.grad(
                [results[segment.target]],
                [*inputs, *tensors],
                [grad.to(results[segment.target].dtype)],
                allow_unused=True,
            )
            if wants_input and found[0] is not None:
                needed = self.parts.needed(segment.whole, chunk)
                below.add(self.parts.reads(segment.source, chunk, needed), found[0])
            sums = summed(list(found[len(inputs) :]))
            del found, leaves, results
            self.sums.add(parameters, sums, [grad])
            del grad  # or they would live through the next chunk's peak
