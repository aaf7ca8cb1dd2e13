"""Forward and backward of a program, segment by segment, pass by pass, chunk by chunk."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ds_wsi.partition.halo import Range
from ds_wsi.partition.norm import Statistics
from ds_wsi.partition.program import Chunk, Piece, Program, Segment
from ds_wsi.partition.segment import Random, Subgraph, hull
from ds_wsi.partition.staging import HostStore, Ticket
from ds_wsi.partition.values import Given, Rows, Tiles

Extent = Given | Tiles | Rows
_MIN_OFFLOAD_BYTES = 2**12  # smaller tensors cost more to copy than to keep


@dataclass
class _Saved:
    """What a segment keeps from forward to backward."""

    source: Extent
    values: dict[fx.Node, Extent] = field(default_factory=dict)
    graphs: dict[tuple[int, int], Any] = field(default_factory=dict)
    statistics: list[dict[fx.Node, Statistics]] = field(default_factory=list)


class Call:
    """One call of a partitioned module: its forward, and its backward if there is one.

    Args:
        program: to run.
        x: input [N, ...] (or images [B, C, H, W]), on the module's device or on the host.
        bags: ranges of tiles that are a population each.
        prepare: applied to each chunk of the input on the device, without gradient.
        save: whether backward will follow.
        input_grad: whether it shall reach `x`.
        device: of the computation.
        autocast: a context of the autocast settings in force at the call.
        track: whether running statistics are updated.
        store: of host memory; None makes one.
        phase: called at the end of each segment's forward and backward, with its index.
        simulated: on fake tensors: no random numbers, no streams.
    """

    def __init__(
        self,
        program: Program,
        x: Tensor,
        bags: list[Range],
        *,
        prepare: Callable[[Tensor], Tensor] | None,
        save: bool,
        input_grad: bool,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        track: bool = True,
        store: HostStore | None = None,
        phase: Callable[[str, int], None] | None = None,
        simulated: bool = False,
    ) -> None:
        self.program, self.bags, self.save, self.input_grad = program, bags, save, input_grad
        self.device, self.autocast, self.track = device, autocast, track
        self.batch = x.shape[0]
        self.x: Given | None = Given(x, 2 if program.rules is not None else 0, device, prepare)
        self.random = Random(device, replayable=not simulated)
        self.store = store or HostStore(device, overlap=not simulated)
        self._grad_needs = _grad_needs(program, input_grad)
        self.saved: list[_Saved | None] = []
        self.gradients: dict[int, Tensor] = {}
        self._own_sums: set[int] = set()
        self._offloaded: list[Ticket] = []
        self.boundary_bytes = 0  # of the tensor between the last segment worked on and the next
        self.phase = phase or (lambda name, index: None)

    # ---------------------------------------------------------------------------------------------- forward

    def forward(self) -> Tensor:
        """The module's output."""
        assert self.x is not None
        extent: Extent = self.x
        needs = self.input_grad
        segments = self.program.segments
        with self.autocast():
            for index, segment in enumerate(segments):
                needs = needs or any(parameter.requires_grad for parameter in _parameters(segment))
                follower = segments[index + 1].spec if index + 1 < len(segments) else None
                saved = _Saved(extent)
                saved.statistics = [{n: Statistics() for n in segment.sites} for _ in self.bags]
                out = self._new_extent(segment, segment.target, host=follower is not None and follower.host_input)
                if segment.spec.mode == "recompute":
                    self._forward_recompute(segment, saved, out)
                else:
                    self._forward_hold(segment, saved, out, keep=self.save and needs)
                self.saved.append(saved if self.save and needs else None)
                if not (self.save and needs):
                    extent.clear()
                    saved.values.clear()
                elif segment.spec.mode in ("keep", "offload"):
                    saved.source = Tiles()  # the graphs hold what backward reads
                    if not any(z is segment.source for z in segment.norms_of):
                        if extent is not self.x:
                            extent.clear()
                    else:
                        saved.source = extent
                extent = out
                self.boundary_bytes = out.device_bytes
                self.phase("forward", index)
        self.x = None
        output = extent.whole()  # type: ignore[union-attr]
        return output

    def _forward_hold(self, segment: Segment, saved: _Saved, out: Tiles | Rows, *, keep: bool) -> None:
        """Level by level over all chunks; what the mode keeps stays in `saved`."""
        mode = segment.spec.mode
        graph_kept = keep and mode in ("keep", "offload")
        values: dict[fx.Node, Extent] = {segment.source: saved.source}
        chunks = self._chunks(segment)
        if segment.source in segment.norms_of:
            self._collect_source(segment, saved, chunks)
        self._finish_statistics(segment, saved, level=None)
        for index, piece in enumerate(segment.pieces):
            for target in piece.graph.targets:
                values[target] = (
                    out if target is segment.target else self._new_extent(segment, target, host=mode == "stream")
                )
            for position, chunk in enumerate(chunks):
                self._prefetch(segment, piece.graph, values, chunks, position + 1)
                results = (
                    self._keep_graph(segment, piece, index, chunk, values, saved)
                    if graph_kept
                    else self._run(segment, piece.graph, chunk, values, saved.statistics[chunk.population])
                )
                self._write(segment, chunk, results, values, saved)
                del results  # or they would live through the next chunk's peak
            self._finish_statistics(segment, saved, level=piece)
            held = keep and mode in ("lean", "stream")
            for node, last in segment.readers.items():
                done = last <= index and node in values and node is not segment.source and node is not segment.target
                if done and not held and not (graph_kept and node in segment.norms_of):
                    values.pop(node).clear()
        if keep and mode != "checkpoint":
            del values[segment.source]
            values.pop(segment.target, None)
            saved.values = values
            if mode == "offload":
                self._norm_inputs_to_host(segment, saved)

    def _write(
        self,
        segment: Segment,
        chunk: Chunk,
        results: dict[fx.Node, Tensor],
        values: dict[fx.Node, Extent],
        saved: _Saved,
    ) -> None:
        for target, result in results.items():
            self._collect(segment, target, result, saved.statistics[chunk.population])
            values[target].write(self._own(segment, target, chunk), result.detach())  # type: ignore[union-attr]

    def _forward_recompute(self, segment: Segment, saved: _Saved, out: Tiles | Rows) -> None:
        """From the segment's input each time: one pass for each level of norms, one for the output."""
        values: dict[fx.Node, Extent] = {segment.source: saved.source}
        chunks = self._chunks(segment)
        for piece, prefix in zip(segment.pieces, segment.prefixes, strict=True):
            if prefix.targets:
                for chunk in chunks:
                    found = saved.statistics[chunk.population]
                    for target, result in self._run(segment, prefix, chunk, values, found).items():
                        self._collect(segment, target, result, found)
                self._finish_statistics(segment, saved, level=piece, inputs=prefix.targets)
        for position, chunk in enumerate(chunks):
            self._prefetch(segment, segment.whole, values, chunks, position + 1)
            results = self._run(segment, segment.whole, chunk, values, saved.statistics[chunk.population])
            out.write(self._own(segment, segment.target, chunk), results[segment.target])

    def _run(
        self,
        segment: Segment,
        graph: Subgraph,
        chunk: Chunk,
        values: dict[fx.Node, Extent],
        statistics: dict[fx.Node, Statistics],
    ) -> dict[fx.Node, Tensor]:
        """The targets' own tiles or rows of a chunk, without gradient."""
        with torch.no_grad(), _no_checkpoint():
            needed = self._needed(segment, graph, chunk)
            inputs = {node: values[node].read(self._reads(segment, node, chunk, needed)) for node in graph.sources}
            found = graph.run(inputs, statistics, self.random, (segment.target, chunk.index), needed=needed)
            return {node: self._crop_own(segment, node, value, chunk, needed) for node, value in found.items()}

    def _keep_graph(
        self,
        segment: Segment,
        piece: Piece,
        index: int,
        chunk: Chunk,
        values: dict[fx.Node, Extent],
        saved: _Saved,
    ) -> dict[fx.Node, Tensor]:
        """As `_run`, with autograd's graph kept; in `offload` what it saves goes to host memory."""
        with self._saved_on_host(segment) if segment.spec.mode == "offload" else nullcontext():
            leaves, results = self._with_graph(
                segment, piece.graph, chunk, values, saved.statistics[chunk.population], None
            )
        saved.graphs[index, chunk.index] = _edges(leaves), _edges(results)
        return results

    def _with_graph(
        self,
        segment: Segment,
        graph: Subgraph,
        chunk: Chunk,
        values: dict[fx.Node, Extent],
        statistics: dict[fx.Node, Statistics],
        corrected: set[fx.Node] | None,
        known: dict[fx.Node, Tensor] | None = None,
    ) -> tuple[dict[fx.Node, Tensor], dict[fx.Node, Tensor]]:
        """The leaves of a chunk's graph, and the targets' own tiles or rows on top of it."""
        offloads = segment.spec.mode == "offload"  # by such hooks
        with torch.enable_grad(), nullcontext() if offloads else _no_checkpoint():
            needed = self._needed(segment, graph, chunk)
            leaves = {}
            anchor = torch.empty(0, requires_grad=True)
            for node in graph.sources:
                value = values[node].read(self._reads(segment, node, chunk, needed)).detach()
                wanted = value.is_floating_point() and self._needs_grad(node)
                leaves[node] = _Source.apply(anchor, value) if wanted else value
            own = None
            if corrected is not None:
                own = {
                    node: self._own(segment, node.all_input_nodes[0], chunk) if segment.in_rows else None
                    for node in corrected
                }
            found = graph.run(
                dict(leaves),
                statistics,
                self.random,
                (segment.target, chunk.index),
                needed=needed,
                corrected=own,
                known=known,
            )
            return leaves, {node: self._crop_own(segment, node, value, chunk, needed) for node, value in found.items()}

    # --------------------------------------------------------------------------------------------- backward

    def backward(self, grad: Tensor) -> tuple[Tensor | None, dict[int, Tensor]]:
        """The input's gradient (None where it is not wanted) and the parameters', by id, summed over the chunks."""
        rows = self.program.segments[-1].in_rows
        above: Extent = Given(grad, 2 if rows else 0, self.device, None)
        ambient = self.random.read()
        with self.autocast():
            for index in reversed(range(len(self.program.segments))):
                saved, self.saved[index] = self.saved[index], None
                if saved is None:
                    break
                segment = self.program.segments[index]
                host = segment.spec.host_input and index > 0  # the input's gradient is the caller's
                below = self._new_extent(segment, segment.source, host=host, source=True)
                if segment.spec.mode == "recompute":
                    self._backward_recompute(segment, saved, above, below)
                else:
                    self._backward_hold(segment, saved, above, below)
                above.clear()
                if saved.source is not None:
                    saved.source.clear()
                above = below
                self.boundary_bytes = below.device_bytes
                self.phase("backward", index)
        self.random.write(ambient)
        return (above.whole() if self.input_grad and isinstance(above, Tiles | Rows) else None), self.gradients

    def _backward_hold(self, segment: Segment, saved: _Saved, above: Extent, below: Tiles | Rows) -> None:
        chunks = self._chunks(segment)
        values = {segment.source: saved.source, **saved.values}
        if segment.spec.mode == "checkpoint":
            self._rebuild(segment, saved, values, chunks)
        gradients: dict[fx.Node, Extent] = {segment.target: above, segment.source: below}
        host = segment.spec.mode == "stream"
        for index in reversed(range(len(segment.pieces))):
            piece = segment.pieces[index]
            for node in piece.graph.sources:
                if node not in gradients:
                    gradients[node] = self._new_extent(segment, node, host=host)
            for position in reversed(range(len(chunks))):
                chunk = chunks[position]
                if not saved.graphs:
                    self._prefetch(segment, piece.graph, values, chunks, position - 1)
                statistics = saved.statistics[chunk.population]
                grads = self._output_grads(segment, piece, chunk, values, gradients, statistics)
                if grads:
                    self._piece_backward(segment, index, chunk, values, gradients, saved, grads)
            for node in reversed(piece.barriers):
                for statistics in saved.statistics:
                    self._conclude(segment, node, statistics[node])
            for node in piece.graph.targets:
                # Read for the last time: earlier pieces compute other values.
                if node in values and node is not segment.source:
                    values.pop(node).clear()
                if node is not segment.target and node in gradients:
                    gradients.pop(node).clear()
        if segment.source in segment.norms_of and self._needs_grad(segment.source):
            for chunk in chunks:
                where = self._own(segment, segment.source, chunk)
                fixed = self._corrections(
                    segment, segment.source, saved.source.read(where), saved.statistics[chunk.population]
                )
                below.add(where, fixed)

    def _output_grads(
        self,
        segment: Segment,
        piece: Piece,
        chunk: Chunk,
        values: dict[fx.Node, Extent],
        gradients: dict[fx.Node, Extent],
        statistics: dict[fx.Node, Statistics],
    ) -> dict[fx.Node, Tensor]:
        """What flows to the chunk's targets, norm inputs corrected."""
        grads = {}
        for node in piece.graph.targets:
            if not self._needs_grad(node):
                continue
            where = self._own(segment, node, chunk)
            if where[0] == where[1] or node not in gradients:
                continue
            extent = gradients[node]
            empty = isinstance(extent, Rows) and extent.buffer is None and not extent.blocks.parts
            if empty or (isinstance(extent, Tiles) and not extent.parts):
                continue
            grad = extent.read(where)
            extent.drop(where) if isinstance(extent, Tiles) else None
            for norm in segment.norms_of.get(node, ()):
                grad = segment.sites[norm].correct(statistics[norm], values[node].read(where), grad)
            grads[node] = grad
        return grads

    def _piece_backward(
        self,
        segment: Segment,
        index: int,
        chunk: Chunk,
        values: dict[fx.Node, Extent],
        gradients: dict[fx.Node, Extent],
        saved: _Saved,
        grads: dict[fx.Node, Tensor],
    ) -> None:
        piece, statistics = segment.pieces[index], saved.statistics[chunk.population]
        kept = saved.graphs.pop((index, chunk.index), None)
        if kept is None:
            # Of a final convolution the graph alone is needed; its result has its gradient's shape and dtype.
            leaves, results = self._with_graph(segment, piece.graph, chunk, values, statistics, None, known=grads)
            kept = _edges(leaves), _edges(results)
            del leaves, results
        leaves, results = kept
        self._differentiate(segment, piece, chunk, leaves, results, grads, statistics, gradients)
        for node in piece.graph.targets:
            extent = values.get(node)
            if isinstance(extent, Tiles) and node is not segment.source:
                extent.drop(self._own(segment, node, chunk))

    def _differentiate(
        self,
        segment: Segment,
        piece: Piece,
        chunk: Chunk,
        leaves: dict[fx.Node, GradientEdge],
        results: dict[fx.Node, GradientEdge],
        grads: dict[fx.Node, Tensor],
        statistics: dict[fx.Node, Statistics],
        gradients: dict[fx.Node, Extent],
    ) -> None:
        wanted = list(leaves)
        affine = [(node, part) for node in piece.barriers for part in segment.sites[node].affine(statistics[node])]
        parameters = [parameter for parameter in piece.graph.parameters if parameter.requires_grad]
        outputs = [(results[node], grad) for node, grad in grads.items() if node in results]
        if not outputs:
            return
        inputs: list[Any] = [*(leaves[node] for node in wanted), *(part for _, part in affine), *parameters]
        found = torch.autograd.grad(
            [output for output, _ in outputs],
            inputs,
            [grad for _, grad in outputs],
            allow_unused=True,
        )
        needed = self._needed(segment, piece.graph, chunk)
        for node, grad in zip(wanted, found, strict=False):
            if grad is not None:
                gradients[node].add(self._reads(segment, node, chunk, needed), grad)  # type: ignore[union-attr]
        rest = found[len(wanted) :]
        sums: list[Tensor | None] = list(found[len(wanted) + len(affine) :])
        for (node, _), (dgamma, dbeta) in zip(affine[::2], zip(rest[::2], rest[1::2], strict=False), strict=False):
            if dgamma is not None and dbeta is not None:
                segment.sites[node].reduce(statistics[node], dgamma, dbeta)
        del found, rest
        self._add_gradients(parameters, sums, [grad for _, grad in outputs])

    def _backward_recompute(self, segment: Segment, saved: _Saved, above: Extent, below: Tiles | Rows) -> None:
        values: dict[fx.Node, Extent] = {segment.source: saved.source}
        chunks = self._chunks(segment)
        known: set[fx.Node] = set()
        for piece in reversed(segment.pieces):
            if not piece.barriers:
                continue
            for chunk in reversed(chunks):
                statistics = saved.statistics[chunk.population]
                grad = above.read(self._own(segment, segment.target, chunk))
                _, results = self._with_graph(segment, segment.whole, chunk, values, statistics, known)
                leaves = [part for node in piece.barriers for part in segment.sites[node].affine(statistics[node])]
                found = torch.autograd.grad([results[segment.target]], leaves, [grad], allow_unused=True)
                for node, dgamma, dbeta in zip(piece.barriers, found[::2], found[1::2], strict=True):
                    if dgamma is not None:
                        segment.sites[node].reduce(statistics[node], dgamma, dbeta)
                del results, grad
            for node in reversed(piece.barriers):
                for statistics in saved.statistics:
                    self._conclude(segment, node, statistics[node])
            known |= set(piece.barriers)
        parameters = [parameter for parameter in segment.whole.parameters if parameter.requires_grad]
        wants_input = self._needs_grad(segment.source)
        if not parameters and not wants_input:
            return
        for position in reversed(range(len(chunks))):
            chunk = chunks[position]
            self._prefetch(segment, segment.whole, values, chunks, position - 1)
            statistics = saved.statistics[chunk.population]
            grad = above.read(self._own(segment, segment.target, chunk))
            leaves_, results = self._with_graph(segment, segment.whole, chunk, values, statistics, known)
            inputs = [leaves_[segment.source]] if wants_input else []
            found = torch.autograd.grad(
                [results[segment.target]],
                [*inputs, *parameters],
                [grad.to(results[segment.target].dtype)],
                allow_unused=True,
            )
            if wants_input and found[0] is not None:
                needed = self._needed(segment, segment.whole, chunk)
                below.add(self._reads(segment, segment.source, chunk, needed), found[0])
            sums: list[Tensor | None] = list(found[len(inputs) :])
            del found, leaves_, results
            self._add_gradients(parameters, sums, [grad])
            del grad  # or they would live through the next chunk's peak

    def _rebuild(self, segment: Segment, saved: _Saved, values: dict[fx.Node, Extent], chunks: list[Chunk]) -> None:
        """A checkpointed segment's lean values, but for its output."""
        for piece in segment.pieces:
            targets = [node for node in piece.graph.targets if node is not segment.target]
            if not targets:
                continue
            for target in targets:
                values[target] = self._new_extent(segment, target, host=False)
            for chunk in chunks:
                results = self._run(segment, piece.graph, chunk, values, saved.statistics[chunk.population])
                for target in targets:
                    values[target].write(self._own(segment, target, chunk), results[target])  # type: ignore[union-attr]

    # ----------------------------------------------------------------------------------------- statistics

    def _collect(self, segment: Segment, value: fx.Node, result: Tensor, statistics: dict[fx.Node, Statistics]) -> None:
        for norm in segment.norms_of.get(value, ()):
            with torch.no_grad():
                segment.sites[norm].collect(statistics[norm], result.detach())

    def _collect_source(self, segment: Segment, saved: _Saved, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            part = saved.source.read(self._own(segment, segment.source, chunk))
            self._collect(segment, segment.source, part, saved.statistics[chunk.population])

    def _finish_statistics(
        self, segment: Segment, saved: _Saved, level: Piece | None, inputs: list[fx.Node] | None = None
    ) -> None:
        """Make final the statistics of the norms that read what this level computed (None: the segment's input)."""
        if inputs is None:
            inputs = [segment.source] if level is None else level.graph.targets
        for z in inputs:
            for norm in segment.norms_of.get(z, ()):
                site = segment.sites[norm]
                for statistics in saved.statistics:
                    site.finish(statistics[norm], self.device)
                    if self.track:
                        site.track(statistics[norm], self.batch)

    def _corrections(self, segment: Segment, node: fx.Node, z: Tensor, statistics: dict[fx.Node, Statistics]) -> Tensor:
        total = torch.zeros_like(z)
        for norm in segment.norms_of[node]:
            total = segment.sites[norm].correct(statistics[norm], z, total)
        return total

    def _conclude(self, segment: Segment, node: fx.Node, found: Statistics) -> None:
        site = segment.sites[node]
        own = site.conclude(found)
        if site.batch and site.leaf.affine:
            trained = [part.requires_grad for part in (site.leaf.weight, site.leaf.bias)]
            pairs = zip((site.leaf.weight, site.leaf.bias), own, trained, strict=True)
            for parameter, gradient, wanted in pairs:
                if wanted:
                    self._add_gradients([parameter], [gradient], [gradient])

    def _add_gradients(self, parameters: list[nn.Parameter], found: list[Tensor | None], above: list[Tensor]) -> None:
        """Sum in float32 (float64 for float64), in the order of the chunks; `found` is emptied as it is summed.

        Args:
            parameters: whose gradients they are.
            found: of one chunk, from autograd.
            above: what flowed into the chunk's graph.
        """
        # autograd may hand out one tensor several times, or what flowed in: such a one must not be added to in place.
        places = [tensor.untyped_storage()._cdata for tensor in (*found, *above) if tensor is not None]
        for index, parameter in enumerate(parameters):
            gradient, found[index] = found[index], None
            if gradient is None:
                continue
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            key = id(parameter)
            owned = wide is not gradient or places.count(gradient.untyped_storage()._cdata) == 1
            if key not in self.gradients:
                self.gradients[key] = wide
                if owned:
                    self._own_sums.add(key)
            elif key in self._own_sums:
                self.gradients[key].add_(wide)
            else:
                self.gradients[key] = self.gradients[key] + wide
                self._own_sums.add(key)

    # -------------------------------------------------------------------------------------------- geometry

    def _chunks(self, segment: Segment) -> list[Chunk]:
        height = self.program.heights.get(segment.target, 0)
        return segment.chunks(self.batch, self.bags, height)

    def _own(self, segment: Segment, node: fx.Node, chunk: Chunk) -> Range:
        """The part of a value that the chunk alone computes: all chunks' parts make up the whole."""
        if segment.in_rows:
            height = self.program.heights[node]
            return height * chunk.index // chunk.count, height * (chunk.index + 1) // chunk.count
        if segment.undivided and node is segment.source and node in self.program.heights:
            return 0, self.program.heights[node]
        return chunk.tiles

    def _some_rows(self, segment: Segment, node: fx.Node, chunk: Chunk) -> Range:
        """The rows that a chunk owns, or one where it owns none: operations need a row to work on."""
        first, last = self._own(segment, node, chunk)
        first = min(first, self.program.heights[node] - 1)
        return first, max(first + 1, last)

    def _needed(self, segment: Segment, graph: Subgraph, chunk: Chunk) -> dict[fx.Node, Range] | None:
        if not segment.in_rows:
            return None
        own = {node: self._some_rows(segment, node, chunk) for node in graph.targets}
        if segment.spec.mode == "recompute":
            # A norm's input is corrected by the chunk that owns it, which must therefore hold it.
            for norm in graph.barriers:
                (z,) = norm.all_input_nodes
                part = self._some_rows(segment, z, chunk)
                own[z] = hull(own[z], part) if z in own else part
        return graph.rows(own)

    def _reads(self, segment: Segment, node: fx.Node, chunk: Chunk, needed: dict[fx.Node, Range] | None) -> Range:
        return self._own(segment, node, chunk) if needed is None else needed[node]

    def _crop_own(
        self, segment: Segment, node: fx.Node, value: Tensor, chunk: Chunk, needed: dict[fx.Node, Range] | None
    ) -> Tensor:
        if needed is None:
            return value
        (first, last), (low, high) = self._own(segment, node, chunk), needed[node]
        return value if (first, last) == (low, high) else value[:, :, first - low : last - low]

    def _new_extent(self, segment: Segment, node: fx.Node, *, host: bool, source: bool = False) -> Tiles | Rows:
        store = self.store if host else None
        in_rows = node in self.program.heights and (segment.in_rows or source)
        return Rows(self.program.heights[node], store) if in_rows else Tiles(store)

    def _prefetch(
        self, segment: Segment, graph: Subgraph, values: dict[fx.Node, Extent], chunks: list[Chunk], position: int
    ) -> None:
        if not 0 <= position < len(chunks):
            return
        needed = self._needed(segment, graph, chunks[position])
        for node in graph.sources:
            extent = values.get(node)
            if isinstance(extent, Tiles | Rows) and (extent.host is not None):
                extent.prefetch(self._reads(segment, node, chunks[position], needed))

    # ---------------------------------------------------------------------------------------------- gradient

    def _needs_grad(self, node: fx.Node) -> bool:
        """Whether a gradient has to reach this value."""
        return self._grad_needs[node]

    @contextmanager
    def _saved_on_host(self, segment: Segment) -> Iterator[None]:
        """Autograd's saved tensors in host memory, each once; parameters and small ones stay."""
        held = {id(parameter) for parameter in self.program.traced.module.parameters()}
        storages = {p.untyped_storage()._cdata for p in self.program.traced.module.parameters()}

        def pack(tensor: Tensor) -> Any:
            size = tensor.numel() * tensor.element_size()
            if size < _MIN_OFFLOAD_BYTES or id(tensor) in held or tensor.untyped_storage()._cdata in storages:
                return tensor
            ticket = self.store.put(tensor)
            if ticket.owners == 1:
                ticket.order = len(self._offloaded)
                self._offloaded.append(ticket)
            return _OnHost(self.store, ticket)

        def unpack(packed: Any) -> Tensor:
            if not isinstance(packed, _OnHost):
                return packed
            tensor = self.store.get(packed.ticket)
            if packed.ticket.order:  # backward reads in about the reverse order
                self.store.prefetch(self._offloaded[packed.ticket.order - 1])
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _norm_inputs_to_host(self, segment: Segment, saved: _Saved) -> None:
        """Norm inputs are read once more, for the correction: they follow the saved tensors to the host."""
        for node in list(saved.values):
            extent = saved.values[node]
            moved = self._new_extent(segment, node, host=True)
            for chunk in self._chunks(segment):
                where = self._own(segment, node, chunk)
                moved.write(where, extent.read(where))
            extent.clear()
            saved.values[node] = moved


def _no_checkpoint() -> AbstractContextManager[Any]:
    """Refuses checkpoints within the module: what they would recompute is recomputed already."""
    return torch.autograd.graph.disable_saved_tensors_hooks(
        "a partitioned module must not checkpoint inside a partition, got hooks on saved tensors while it ran. "
        'HINT: switch its checkpointing off; mode "checkpoint" does the same, exactly.'
    )


class _Source(torch.autograd.Function):
    """A value as the beginning of a graph that does not hold it, as a leaf would."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None


class _OnHost:
    """A saved tensor's place; the memory is given back when autograd frees the node that saved it."""

    def __init__(self, store: HostStore, ticket: Ticket) -> None:
        self.store, self.ticket = store, ticket

    def __del__(self) -> None:
        self.store.release(self.ticket)


def _edges(values: dict[fx.Node, Tensor]) -> dict[fx.Node, GradientEdge]:
    """Where gradient enters or leaves a graph, without the tensors, which would stay on the device."""
    return {node: get_gradient_edge(value) for node, value in values.items() if value.requires_grad}


def _parameters(segment: Segment) -> Iterator[nn.Parameter]:
    yield from segment.whole.parameters
    for node in segment.sites:
        yield from segment.sites[node].leaf.parameters()


def _grad_needs(program: Program, input_grad: bool) -> dict[fx.Node, bool]:
    needs = {program.traced.source: input_grad}
    for node in program.traced.nodes:
        own = False
        if node in program.traced.leaves:
            own = any(parameter.requires_grad for parameter in program.traced.leaves[node].parameters())
        elif node.op == "get_attr":
            value: Any = program.traced.module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            own = isinstance(value, Tensor) and value.requires_grad
        needs[node] = own or any(needs[parent] for parent in node.all_input_nodes)
    return needs


def bag_ranges(cu_seqlens: Tensor | None, batch: int, *, shared: bool = False) -> list[Range]:
    """The populations of a stack: its bags, or all of it as one; `shared`: empty ones too, other ranks hold tiles."""
    if cu_seqlens is None:
        return [(0, batch)]
    bounds = [int(bound) for bound in cu_seqlens.tolist()]
    if bounds[0] != 0 or bounds[-1] != batch or any(one > two for one, two in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tiles, {batch}, got {bounds}")
    return [(one, two) for one, two in pairwise(bounds) if two > one or shared]
