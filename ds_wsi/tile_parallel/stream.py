"""Training on a bag of any length in the memory of one chunk: attention pooling read twice.

Pass 1, without gradient: an online softmax over the chunks keeps (m, s, z) alone. With g = dL/dz and
a_k = exp(e_k - m) / s the backward of the pooling is closed: dL/dh_k = a_k g through the value,
dL/de_k = a_k g (h_k - z) through the score. Pass 2 computes each chunk again and sends both back through it. No feature
is kept; among the ranks of a group (m, s, z) and g are exchanged, and nothing else.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ds_wsi.models.aggregators.pooled import PooledAggregator
from ds_wsi.models.output import SlideOutput
from ds_wsi.norms.population import takes_population
from ds_wsi.runtime.contracts import Pools, needs_labels
from ds_wsi.runtime.numerics import autocast_now, widened
from ds_wsi.runtime.seams import AnyBatchNorm, is_zero3_part
from ds_wsi.runtime.seeding import generator_states, keyed_generators, set_generator_states
from ds_wsi.tile_parallel.collectives import Traffic, max_over, sum_over


def stream_bag(
    encoder: nn.Module,
    aggregator: PooledAggregator,
    tiles: Tensor | Sequence[Tensor],
    *,
    chunk_size: int = 64,
    prepare: Callable[[Tensor], Tensor] | None = None,
    keep_chunks: int = 0,
    group: Any = None,
    seed: int | None = None,
    traffic: Traffic | None = None,
) -> SlideOutput:
    """Predict from one bag, with gradients, in memory that does not grow with its tiles.

    Encoder and attention are computed twice (three forwards' and backwards' worth in place of two: 4/3 of the time);
    of the last `keep_chunks` chunks the graphs are kept instead. Random numbers of a chunk are drawn again.

    Args:
        encoder: tiles [n, ...] -> features [n, D], independent of each other: no train-mode BatchNorm, whose population
            would be a chunk (`partition_layers` trains such encoders, exactly).
        aggregator: "attention" or "mean" pooling.
        tiles: [N, ...], on any device; or a sequence of chunks that can be read twice, alike both times.
        chunk_size: tiles per chunk of a tensor.
        prepare: applied to a chunk on the encoder's device, before the encoder.
        keep_chunks: chunks that keep their graph, as many as fit.
        group: ranks that share the bag, each with tiles of its own, perhaps none. One all-reduce of maxima and one of
            sums in forward, one of gradients in backward.
        seed: the seed of the aggregator's head, the same on all ranks of a group.
        traffic: counts them.

    Returns:
        logits [1, C], the same on all ranks, and the attention [n] of this rank's tiles.

    Raises:
        ValueError: the encoder has a train-mode BatchNorm, the pooling is another, or parameters lie in shards.
    """
    _require_streamable(encoder, aggregator)
    device = next((part.device for part in encoder.parameters()), None)
    work = _Work(encoder, aggregator, tiles, chunk_size, prepare, keep_chunks, group, traffic or Traffic(), device)
    parameters = [part for owner in (encoder, aggregator) for part in owner.parameters() if part.requires_grad]
    if torch.is_grad_enabled() and parameters:
        pooled = _Streamed.apply(work, *parameters)
    else:
        pooled = work.first_pass(keep_graphs=False)
    training = aggregator.training and seed is not None
    with keyed_generators(seed if training else None, pooled.device):
        logits = aggregator.head(pooled)
    return SlideOutput(logits, work.attention())


def _require_streamable(encoder: nn.Module, aggregator: nn.Module) -> None:
    if not isinstance(aggregator, Pools) or aggregator.pooling not in ("attention", "mean"):
        raise ValueError(f"a streamed bag must be pooled by attention or mean, got {type(aggregator).__name__}")
    if needs_labels(aggregator) and aggregator.training:
        raise ValueError(
            f"a streamed bag has no loss of its instances, got {type(aggregator).__name__} in training. "
            'HINT: partition_layers(encoder, PartitionPolicy("recompute")) keeps the features, and nothing else.'
        )
    for name, part in encoder.named_modules():
        if isinstance(part, AnyBatchNorm) and takes_population(part):
            raise ValueError(
                f"a streamed encoder must not have a train-mode {type(part).__name__}, got {name!r}: its population "
                "would be a chunk. HINT: partition_layers trains it exactly; or freeze the norms with eval()."
            )
    for owner in (encoder, aggregator):
        for name, parameter in owner.named_parameters():
            if is_zero3_part(parameter) or hasattr(parameter, "placements"):
                raise ValueError(
                    f"a streamed bag needs whole parameters, got {name!r} in shards (ZeRO-3 or FSDP2), which would be "
                    'gathered for every chunk. HINT: partition_layers(encoder, PartitionPolicy("recompute")).'
                )


class _Work:
    """One bag's passes."""

    def __init__(
        self,
        encoder: nn.Module,
        aggregator: Any,
        tiles: Tensor | Sequence[Tensor],
        chunk_size: int,
        prepare: Callable[[Tensor], Tensor] | None,
        keep_chunks: int,
        group: Any,
        traffic: Traffic,
        device: torch.device | None,
    ) -> None:
        self.encoder, self.aggregator, self.prepare = encoder, aggregator, prepare
        self.chunks = tiles if not isinstance(tiles, Tensor) else tiles.split(chunk_size) if len(tiles) else ()
        self.kept_from = len(self.chunks) - keep_chunks
        self.group, self.traffic = group, traffic
        self.device = device or torch.device("cpu")
        self.autocast = autocast_now(self.device)
        self.states: list[list[Tensor] | None] = []
        self.graphs: dict[int, tuple[Tensor, Tensor]] = {}
        self.scores: list[Tensor] = []
        self.largest: Tensor | None = None
        self.totals: Tensor | None = None
        self.pooled: Tensor | None = None

    def encode(self, index: int) -> tuple[Tensor, Tensor]:
        """Embedded instances [n, D'] of a chunk, and their scores [n, M] (zeros under "mean"), float32 or float64."""
        tiles = self.chunks[index].to(self.device, non_blocking=True)
        with self.autocast():
            features = self.encoder(tiles if self.prepare is None else self.prepare(tiles))
            embedded = self.aggregator.embed(features)
            scored = self.aggregator.pooling == "attention"
            scores = self.aggregator.scores(embedded) if scored else embedded.new_zeros(len(embedded), 1)
        return widened(embedded), widened(scores)

    def first_pass(self, *, keep_graphs: bool) -> Tensor:
        """Pooled bag [1, M, D'], merged chunk by chunk, then over the ranks."""
        largest = totals = sums = None
        for index in range(len(self.chunks)):
            before = generator_states(self.device)
            with torch.set_grad_enabled(keep_graphs and index >= self.kept_from):
                embedded, scores = self.encode(index)
            # 5 kB each on a CPU: kept only where something was drawn.
            quiet = all(map(torch.equal, before, generator_states(self.device)))
            self.states.append(None if quiet else before)
            if embedded.requires_grad or scores.requires_grad:
                self.graphs[index] = embedded, scores
            embedded, scores = embedded.detach(), scores.detach()
            self.scores.append(scores)
            top = scores.amax(0)  # [M]
            if largest is None or totals is None or sums is None:
                largest = torch.full_like(top, float("-inf"))
                totals, sums = torch.zeros_like(top), embedded.new_zeros(len(top), embedded.shape[1])
            risen = torch.maximum(largest, top)
            weights = (scores - risen).exp()
            shrink = (largest - risen).exp()
            totals = totals * shrink + weights.sum(0)
            sums = sums * shrink.unsqueeze(1) + weights.T @ embedded
            largest = risen
        if largest is None or totals is None or sums is None:  # a rank without a tile
            largest, totals, sums = self._nothing()
        self.largest = max_over(largest, self.group, self.traffic)
        shrink = (largest - self.largest).exp()
        fused = torch.cat([(sums * shrink.unsqueeze(1)).flatten(), totals * shrink])
        fused = sum_over(fused, self.group, self.traffic)
        self.totals = fused[sums.numel() :]
        self.pooled = fused[: sums.numel()].view_as(sums) / self.totals.unsqueeze(1)
        return self.pooled.unsqueeze(0)

    def _nothing(self) -> tuple[Tensor, Tensor, Tensor]:
        """(-inf, 0, 0) in the shapes that ranks with tiles have."""
        probe = torch.zeros(1, *self._width(), device=self.device, dtype=next(self.aggregator.parameters()).dtype)
        with torch.no_grad(), self.autocast():
            embedded = self.aggregator.embed(probe)
            scored = self.aggregator.pooling == "attention"
            branches = self.aggregator.scores(embedded).shape[1] if scored else 1
        wide = widened(embedded)
        lowest = wide.new_full((branches,), float("-inf"))
        return lowest, torch.zeros_like(lowest), wide.new_zeros(branches, wide.shape[1])

    def _width(self) -> tuple[int, ...]:
        width = getattr(self.encoder, "num_features", None)
        if width is None:
            raise ValueError(
                f"a rank without a tile must know the encoder's width, got {type(self.encoder).__name__} without "
                "`num_features`. HINT: set it, or give every rank a tile."
            )
        return (int(width),)

    def second_pass(self, grad: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """The parameters' gradients, given dL/dz [M, D'] summed over the ranks' losses."""
        assert self.largest is not None
        assert self.totals is not None
        assert self.pooled is not None
        # A rank without a tile: engines wait for a gradient of every parameter.
        sums: list[Tensor | None] = [None if len(self.chunks) else torch.zeros_like(part) for part in parameters]
        through_z = (grad * self.pooled).sum(1)  # g . z, [M]
        ambient = generator_states(self.device)
        for index in range(len(self.chunks)):
            graph = self.graphs.pop(index, None)
            if graph is None:
                state = self.states[index]
                if state is not None:
                    set_generator_states(state, self.device)
                with torch.enable_grad():
                    graph = self.encode(index)
            embedded, scores = graph
            weights = (self.scores[index] - self.largest).exp() / self.totals  # a, [n, M]
            to_embedded = weights @ grad  # value path
            to_scores = weights * (embedded.detach() @ grad.T - through_z)  # score path
            pairs = [(embedded, to_embedded), (scores, to_scores)]
            pairs = [pair for pair in pairs if pair[0].requires_grad]
            if not pairs:
                continue
            outputs, gradients = zip(*pairs, strict=True)
            for number, part in enumerate(torch.autograd.grad(outputs, parameters, gradients, allow_unused=True)):
                if part is not None:
                    wide, before = widened(part), sums[number]
                    sums[number] = wide if before is None else before.add_(wide)
        set_generator_states(ambient, self.device)
        return [None if part is None else part.to(p.dtype) for part, p in zip(sums, parameters, strict=True)]

    def attention(self) -> Tensor | None:
        """The attention of this rank's tiles: [n], or [n, M] of several branches; None under "mean"."""
        if self.aggregator.pooling != "attention" or self.largest is None or self.totals is None:
            return None
        if not self.scores:
            return self.largest.new_zeros(0, len(self.largest)).squeeze(-1)
        return ((torch.cat(self.scores) - self.largest).exp() / self.totals).squeeze(-1)


class _Streamed(torch.autograd.Function):
    """Both passes as one node of the graph: each parameter receives its gradient once."""

    @staticmethod
    def forward(ctx: Any, work: _Work, *parameters: Tensor) -> Tensor:
        ctx.work, ctx.parameters = work, parameters
        with torch.autocast(work.device.type, enabled=False):
            return work.first_pass(keep_graphs=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        work, parameters = ctx.work, ctx.parameters
        summed = sum_over(grad[0], work.group, work.traffic)  # the adjoint of the merge
        return None, *work.second_pass(summed, parameters)
