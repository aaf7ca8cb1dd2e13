"""A simulated call whose passes over the chunks are recorded once and played again: see `tape`."""

from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ds_wsi.norms.population import Moments
from ds_wsi.partition.execution.aliases import trainable
from ds_wsi.partition.execution.call import PartitionedCall
from ds_wsi.partition.execution.chunk_pass import ChunkGraph, ChunkRunner, no_checkpoint
from ds_wsi.partition.execution.segment_norms import SegmentNorms
from ds_wsi.partition.graph.halo import Range
from ds_wsi.partition.graph.norm import Statistics
from ds_wsi.partition.graph.segments import Chunk, Segment
from ds_wsi.partition.graph.subgraph import Subgraph
from ds_wsi.partition.planning.player import Player
from ds_wsi.partition.planning.tape import Given, Part, Tape, form_of


class ReplayedCall(PartitionedCall):
    """A simulated call on meta tensors, whose passes a player plays."""

    def __init__(self, player: Player, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.player = player

    def runner(self, segment: Segment) -> ChunkRunner:
        """A runner that plays its chunks, see `PartitionedCall.runner`."""
        return ReplayedRunner(
            segment,
            self.ranges(segment),
            ReplayedNorms(self.player, segment, len(self.bags), self.device, None, self.tensors),
            self.random,
            self.needs_grad,
            nullcontext,
            self.arguments,
            self.tensors,
            self.player,
            (self.on_host.pack, self.on_host.unpack) if segment.spec.mode == "offload" else None,
        )


class ReplayedNorms(SegmentNorms):
    """Norms whose arithmetic is played."""

    def __init__(self, player: Player, *args: Any) -> None:
        super().__init__(*args)
        self.player = player

    def collect(self, value: fx.Node, part: Tensor, chunk: Chunk) -> None:
        """The moments of a chunk are added by play, see `SegmentNorms.collect`."""
        for norm in self.segment.norms_of.get(value, ()):
            site, statistics = self.segment.sites[norm], self.of(chunk)[norm]
            old = statistics.moments

            def work(given: list[Tensor], site: Any = site, old: Moments | None = old) -> Any:
                stats = Statistics(None if old is None else Moments(old.count, *given[1:]))
                with torch.no_grad():
                    site.collect(stats, given[0].detach())
                new = stats.moments
                if new is None:
                    return [], None
                return [new.mean, new.m2], new.count - (0 if old is None else old.count)

            key = "collect", site.batch, getattr(site.leaf, "num_groups", None)
            (*tensors,), more = self.player.pure(key, [part, *(() if old is None else (old.mean, old.m2))], work)
            if tensors:
                statistics.moments = Moments(more + (0 if old is None else old.count), *tensors)

    def conclude_one(self, norm: fx.Node, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """The correction of a norm is fixed by play, see `SegmentNorms.conclude_one`."""
        site, moments = self.segment.sites[norm], statistics.moments
        assert moments is not None
        assert statistics.mean is not None
        assert statistics.var is not None
        reduced = [part for part in (statistics.dgamma, statistics.dbeta) if part is not None]

        def work(given: list[Tensor]) -> Any:
            mean, var, gamma, *sums = given
            stats = Statistics(Moments(moments.count, mean, var), mean, var, leaves=(gamma, gamma))
            if sums:
                stats.dgamma, stats.dbeta = sums
            local = site.conclude(stats)
            assert stats.correction is not None
            return [*stats.correction, *local], None

        tensors = [statistics.mean, statistics.var, site.affine(statistics)[0], *reduced]
        (scale, shift, *local), _ = self.player.pure(("conclude", torch.is_grad_enabled()), tensors, work)
        statistics.correction = scale, shift
        statistics.dgamma, statistics.dbeta = local
        return statistics.dgamma, statistics.dbeta

    def correct(self, norm: fx.Node, chunk: Chunk, z: Tensor, grad: Tensor) -> Tensor:
        """The gradient is corrected by play, see `SegmentNorms.correct`."""
        site, correction = self.segment.sites[norm], self.of(chunk)[norm].correction
        assert correction is not None

        def work(given: list[Tensor]) -> Any:
            stats = Statistics(correction=(given[0], given[1]))
            return [site.correct(stats, given[2], given[3])], None

        key = "correct", site.batch, getattr(site.leaf, "num_groups", None), torch.is_grad_enabled()
        return self.player.pure(key, [*correction, z, grad], work)[0][0]


@dataclass(frozen=True)
class ReplayedRunner(ChunkRunner):
    """A runner whose passes are played.

    Args:
        player: what plays them.
        hooks: what saves a tensor on the host and brings it back, in mode "offload".
    """

    player: Player
    hooks: Any

    def results(
        self, graph: Subgraph, chunk: Chunk, inputs: dict[fx.Node, Tensor], needed: dict[fx.Node, Range] | None
    ) -> dict[fx.Node, Tensor]:
        """The chunk's results by play, see `ChunkRunner.results`."""
        given = _Inputs(self, graph, chunk, list(inputs), needed, None, [])
        key = "run", given.key, tuple(map(form_of, inputs.values()))  # those of statistics follow
        tensors = given.tensors(inputs, {})
        part = self.player.parts.get(key)
        if part is None:

            def work(stand_ins: list[Tensor]) -> Any:
                return given.plain(stand_ins), None

            part = self.player.parts[key] = self.player.new_tape().part(list(map(self.player.given, tensors)), work)
        slots = dict(zip(part.given, tensors, strict=True))
        tensors.clear()
        inputs.clear()
        return given.taken(self.player.play(part, slots, None))

    def graph(
        self,
        graph: Subgraph,
        chunk: Chunk,
        inputs: dict[fx.Node, Tensor],
        needed: dict[fx.Node, Range] | None,
        corrected: dict[fx.Node, Range | None] | None,
        known: dict[fx.Node, Tensor] | None,
    ) -> ChunkGraph:
        """The chunk's graph, whose gradients are played too, see `ChunkRunner.graph`."""
        given = _Inputs(self, graph, chunk, list(inputs), needed, corrected, list(known or ()))
        tensors = given.tensors(inputs, known or {})
        leaves = dict(inputs)
        inputs.clear()
        return ReplayedGraph(given, tensors, leaves)


class _Inputs:
    """What a pass is given, and how it is run on stand-ins for that.

    Attributes:
        key: what tells it apart from other passes, beside the forms of its tensors.
    """

    def __init__(
        self,
        runner: ReplayedRunner,
        graph: Subgraph,
        chunk: Chunk,
        sources: list[fx.Node],
        needed: dict[fx.Node, Range] | None,
        corrected: dict[fx.Node, Range | None] | None,
        known: list[fx.Node],
    ) -> None:
        self.runner, self.graph, self.chunk, self.needed = runner, graph, chunk, needed
        self.sources, self.corrected, self.known = sources, corrected, known
        self.statistics = runner.norms.of(chunk)
        # Norms without a gamma, or a beta, of their own: the first pass makes one.
        self.blank = [
            norm
            for norm in graph.barriers
            if self.statistics[norm].leaves is None and not graph.sites[norm].has_own_affine
        ]
        rows = None if needed is None else (chunk.index, chunk.count, tuple(needed.items()))
        norms = None if corrected is None else tuple(corrected.items())
        self.keeps = runner.segment.spec.mode == "recompute"  # the tensors, beside the graph
        self.key: Hashable = (
            *(runner.player.kind(graph), tuple(sources)),
            *(runner.segment.in_rows, chunk.tiles[1] - chunk.tiles[0], rows, norms, tuple(known)),
            *(runner.hooks is not None, self.keeps, tuple(self.blank)),
        )

    def tensors(self, inputs: dict[fx.Node, Tensor], known: dict[fx.Node, Tensor]) -> list[Tensor]:
        """All that the pass reads: the sources, known results, and the norms' statistics."""
        tensors = [*inputs.values(), *known.values()]
        for norm in self.graph.barriers:
            stats = self.statistics[norm]
            assert stats.mean is not None
            assert stats.var is not None
            tensors += [stats.mean, stats.var]
            if norm not in self.blank:
                tensors += self.graph.sites[norm].affine(stats)
            if self.corrected is not None and norm in self.corrected:
                assert stats.correction is not None
                tensors += stats.correction
        return tensors

    def made(self, results: dict[fx.Node, Tensor], statistics: dict[fx.Node, Statistics]) -> list[Tensor]:
        """What the pass returns: the targets' values, and what it has made of norms."""
        return [*results.values(), *(leaf for norm in self.blank for leaf in statistics[norm].leaves or ())]

    def taken(self, outputs: list[Any]) -> dict[fx.Node, Tensor]:
        """The targets' values; what was made of norms goes to the call's statistics."""
        targets = self.graph.targets
        for index, norm in enumerate(self.blank):
            gamma, beta = outputs[len(targets) + 2 * index :][:2]
            self.statistics[norm].leaves = gamma.requires_grad_(), beta.requires_grad_()
        return dict(zip(targets, outputs, strict=False))

    def plain(self, given: list[Tensor]) -> list[Tensor]:
        """The pass without gradient."""
        inputs, _, statistics = self._divided(given)
        with torch.no_grad(), no_checkpoint():
            return self.made(self._runner(statistics).results(self.graph, self.chunk, inputs, self.needed), statistics)

    def with_graph(self, given: list[Tensor], tape: Tape) -> tuple[ChunkGraph, dict[fx.Node, Statistics]]:
        """The pass with a graph, on stand-ins for the statistics."""
        inputs, results, statistics = self._divided(given)
        saving = tape.saving() if self.runner.hooks is not None else no_checkpoint()
        with torch.enable_grad(), saving:
            runner = self._runner(statistics)
            graph = runner.graph(self.graph, self.chunk, inputs, self.needed, self.corrected, results or None)
        return graph, statistics

    def _divided(
        self, given: list[Tensor]
    ) -> tuple[dict[fx.Node, Tensor], dict[fx.Node, Tensor], dict[fx.Node, Statistics]]:
        """What `tensors` has put in one list."""
        given.reverse()
        inputs = {node: given.pop() for node in self.sources}
        results = {node: given.pop() for node in self.known}
        statistics = dict(self.statistics)
        for norm in self.graph.barriers:
            stats = statistics[norm] = Statistics(mean=given.pop(), var=given.pop())
            if norm not in self.blank:
                stats.leaves = given.pop().requires_grad_(), given.pop().requires_grad_()
            if self.corrected is not None and norm in self.corrected:
                stats.correction = given.pop(), given.pop()
        return inputs, results, statistics

    def _runner(self, statistics: dict[fx.Node, Statistics]) -> ChunkRunner:
        runner = self.runner
        return ChunkRunner(
            *(runner.segment, runner.ranges, _Fixed(statistics), runner.random, runner.needs_grad, nullcontext),  # type: ignore[arg-type]
            *(runner.arguments, runner.tensors),
        )


class _Fixed:
    """Statistics of one population."""

    def __init__(self, statistics: dict[fx.Node, Statistics]) -> None:
        self.statistics = statistics

    def of(self, chunk: Chunk) -> dict[fx.Node, Statistics]:
        """The statistics that were given, whatever the chunk, see `SegmentNorms.of`."""
        return self.statistics


class _Live:
    """A recorded forward, from which a backward can be recorded once."""

    def __init__(
        self,
        tape: Tape,
        given: list[Given],
        tensors: list[Tensor],
        graph: ChunkGraph,
        statistics: dict[fx.Node, Statistics],
    ) -> None:
        self.given = given
        self._recorded: Any = tape, tensors, graph, statistics

    @property
    def is_used(self) -> bool:
        """Whether the backward was recorded: its graph is gone."""
        return self._recorded is None

    def backward(
        self, forms: list[Given], targets: tuple[fx.Node, ...], sources: Any, norms: Any, parameters: int
    ) -> Part:
        """The recording of a backward: see `ChunkGraph.gradients`."""
        (tape, tensors, graph, statistics), self._recorded = self._recorded, None

        def work(grads: list[Tensor]) -> Any:
            beside = [leaf for norm in norms for leaf in statistics[norm].leaves or ()]
            outputs = list(zip(targets, grads, strict=True))
            del grads
            return graph.gradients(outputs, list(sources), list(norms), beside + (tensors if parameters else [])), None

        return tape.part(forms, work)


class ReplayedGraph(ChunkGraph):
    """A chunk's graph whose forward was played: what it holds, in tensors and in bytes."""

    def __init__(self, given: _Inputs, tensors: list[Tensor], leaves: dict[fx.Node, Tensor]) -> None:
        self.given, self.player = given, given.runner.player
        read = len(given.sources) + len(given.known)
        self.key = "graph", given.key, tuple(map(form_of, tensors[:read]))  # those of statistics follow
        self.bytes = 0
        part = self.player.parts.get(self.key) or self._record(list(map(self.player.given, tensors)))
        self.slots: dict[int, Any] = dict(zip(part.given, tensors, strict=True))
        tensors.clear()
        super().__init__(leaves, given.taken(self._play(part)))
        self.flows: tuple[list[fx.Node], list[fx.Node]] = part.aside

    def __del__(self) -> None:
        """What no backward has freed goes with the graph."""
        if self.player.meter is not None:
            self.player.meter.live -= self.bytes

    def let_go(self) -> None:
        """See `ChunkGraph.let_go`."""
        self.leaves, self.results = (dict.fromkeys(nodes) for nodes in self.flows)

    def forget(self) -> None:
        """See `ChunkGraph.forget`."""
        super().forget()
        assert self.player.meter is not None
        self.player.meter.live -= self.bytes
        self.bytes = 0
        self.slots.clear()

    def gradients(
        self, outputs: list[tuple[fx.Node, Tensor]], sources: list[fx.Node], norms: list[fx.Node], beside: list[Tensor]
    ) -> list[Tensor | None]:
        """See `ChunkGraph.gradients`."""
        targets, grads = [node for node, _ in outputs], [grad for _, grad in outputs]
        asked = tuple(targets), tuple(sources), tuple(norms), len(beside) - 2 * len(norms)
        key = "gradients", self.key, asked, tuple(map(form_of, grads))
        part = self.player.parts.get(key)
        if part is None:
            live = self.player.live.get(self.key)
            assert live is not None
            if live.is_used:
                self._record(live.given)
                live = self.player.live[self.key]
            part = self.player.parts[key] = live.backward(list(map(self.player.given, grads)), *asked)
        self.slots |= zip(part.given, grads, strict=True)
        return self._play(part)

    def _play(self, part: Part) -> list[Tensor | None]:
        self.bytes += part.bytes
        return self.player.play(part, self.slots, self.given.runner.hooks)

    def _record(self, forms: list[Given]) -> Part:
        """The forward's recording; its graph waits for the backward's."""
        tape, given = self.player.new_tape(), self.given
        held: list[Any] = []

        def work(stand_ins: list[Tensor]) -> Any:
            graph, statistics = given.with_graph(stand_ins, tape)
            results = given.made(graph.results, statistics)
            flows = (
                [node for node, leaf in graph.leaves.items() if leaf.requires_grad],
                [node for node, result in graph.results.items() if result.requires_grad],
            )
            if not given.keeps:
                graph.let_go()
            held.extend((graph, statistics))
            return results, flows

        part = self.player.parts[self.key] = tape.part(forms, work)
        aliases = given.runner.tensors.aliases
        tensors = trainable(given.graph.parameters, aliases)[1]
        self.player.live[self.key] = _Live(tape, forms, tensors, *held)
        return part
