"""`shard_tiles`: a model whose bags lie on several ranks, in place, and back."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_wsi.models.aggregators.pooled import PooledAggregator
from ds_wsi.models.output import SlideOutput
from ds_wsi.norms.roles import batch_norms
from ds_wsi.norms.shared import share_norms
from ds_wsi.runtime.contracts import needs_labels
from ds_wsi.runtime.forwards import Handle
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.seams import AnyDropout
from ds_wsi.runtime.seeding import keyed_generators
from ds_wsi.stacking.randomness import stack_bounds
from ds_wsi.stacking.segment_ops import segment_ids
from ds_wsi.stacking.stacked_bags import StackedBags, bounds_on, lengths_of
from ds_wsi.tile_parallel.collectives import Scaled, Traffic, all_rows, rank_in, rows_to_first, share_numbers, size_of
from ds_wsi.tile_parallel.mesh import TileMesh
from ds_wsi.tile_parallel.policy import TileParallelPolicy
from ds_wsi.tile_parallel.pooling import pool_shards


class SharedForward:
    """The forward of an aggregator whose bags lie on the ranks of a group; collective.

    Takes a StackedBags of this rank's features [n, D], every bag of the group in the same order, some of them perhaps
    without a row. Returns logits [B, C], the same on all ranks, and the attention of this rank's rows (None under
    "gather").

    Attributes:
        exchange: "sharded", "replicated" or "gather".
        seed: what the aggregator draws by, the same on all ranks of the group; None: the first rank draws one, and an
            all-gather of one number per rank shares it.
        traffic: bytes and calls of the exchange.
    """

    def __init__(self, aggregator: nn.Module, group: Any, exchange: str) -> None:
        self.aggregator, self.group = aggregator, group
        self.exchange = exchange
        self.original: Callable[..., SlideOutput] = aggregator.forward
        self.seed: int | None = None
        self.traffic = Traffic()

    def __call__(self, bags: StackedBags, labels: Tensor | None = None) -> SlideOutput:
        """See the class."""
        if self.exchange == "sharded":
            return self._sharded(bags, labels)
        numbers = share_numbers(
            [*lengths_of(bags.cu_seqlens), self._draw()], self.group, bags.values.device, self.traffic
        )  # [T, B + 1]
        lengths, seed = numbers[:, :-1], int(numbers[0, -1])
        more = () if labels is None else (labels,)
        return (self._replicated if self.exchange == "replicated" else self._gathered)(bags, lengths, seed, *more)

    def _draw(self) -> int:
        return int(torch.randint(0, 2**31, ()).item()) if self.seed is None else self.seed

    def _sharded(self, bags: StackedBags, labels: Tensor | None) -> SlideOutput:
        aggregator: Any = self.aggregator
        with stack_bounds(bags.cu_seqlens):
            embedded = aggregator.embed(bags.values)
            scores = aggregator.scores(embedded) if aggregator.pooling == "attention" else None
        pooled, attention = pool_shards(aggregator.pooling, embedded, scores, bags.cu_seqlens, self.group, self.traffic)
        auxiliary = None
        if labels is not None and scores is not None and needs_labels(aggregator):
            auxiliary = self._instance_loss(embedded, scores, bags.cu_seqlens, labels)
        seed = None
        draws = any(isinstance(part, AnyDropout) and part.p > 0 for part in aggregator.modules())
        if aggregator.training and draws:
            seed = self.seed
            if seed is None:
                seed = int(share_numbers([self._draw()], self.group, bags.values.device, self.traffic)[0, 0])
        with keyed_generators(seed, bags.values.device):
            logits = aggregator.head(pooled.to(bags.values.dtype))
        return SlideOutput(logits, None if attention is None else attention.squeeze(-1), auxiliary)

    def _instance_loss(self, embedded: Tensor, scores: Tensor, cu_seqlens: Tensor, labels: Tensor) -> Tensor:
        """CLAM's, from the instances that each rank's part could contribute: O(k D) bytes."""
        aggregator: Any = self.aggregator
        chosen = aggregator.candidates(scores.detach(), cu_seqlens)
        counts = torch.bincount(segment_ids(cu_seqlens, len(embedded))[chosen], minlength=len(cu_seqlens) - 1)
        lengths = share_numbers(counts.tolist(), self.group, scores.device, self.traffic)  # [T, B]
        mine = torch.cat([embedded[chosen], scores[chosen].to(embedded.dtype)], 1)
        rows = all_rows(mine, lengths.sum(1).tolist(), self.group, self.traffic)
        order, whole = _in_bag_order(lengths, rows.device)
        instances, their_scores = rows[order].split([embedded.shape[1], scores.shape[1]], 1)
        return aggregator.instance_loss(instances, their_scores, whole, labels)

    def _replicated(self, bags: StackedBags, lengths: Tensor, seed: int, *labels: Tensor) -> SlideOutput:
        rows = all_rows(bags.values, lengths.sum(1).tolist(), self.group, self.traffic)
        order, whole = _in_bag_order(lengths, rows.device)
        with keyed_generators(seed, rows.device):
            out = self.original(StackedBags(rows[order], whole), *labels)
        if out.attention is None:
            return out
        by_rank = torch.empty_like(out.attention)
        by_rank[order] = out.attention
        first = int(lengths[: rank_in(self.group)].sum())
        return out._replace(attention=by_rank[first : first + len(bags.values)])

    def _gathered(self, bags: StackedBags, lengths: Tensor, seed: int, *labels: Tensor) -> SlideOutput:
        rows = rows_to_first(bags.values, lengths.sum(1).tolist(), self.group, self.traffic)
        if rank_in(self.group) == 0:
            order, whole = _in_bag_order(lengths, rows.device)
            with keyed_generators(seed, rows.device):
                out = self.original(StackedBags(rows[order], whole), *labels)
            # The loss is counted once, not by every rank: see [Note: one rule for all exchanges].
            times = float(size_of(self.group))
            logits = Scaled.apply(out.logits, times)
            auxiliary = None if out.auxiliary_loss is None else Scaled.apply(out.auxiliary_loss, times)
            for value in (logits, auxiliary):
                if value is not None:
                    dist.broadcast(value.detach().clone(), group_src=0, group=self.group)
            return SlideOutput(logits, None, auxiliary)
        # A bag of one row of zeros: engines wait for a gradient of every parameter on every rank, and it is zero here.
        n_bags = lengths.shape[1]
        blank = rows.detach().new_zeros(n_bags, *rows.shape[1:])
        with keyed_generators(seed, rows.device):
            out = self.original(StackedBags(blank, bounds_on(rows.device, [1] * n_bags)), *labels)
        received = []
        nothing = rows.sum() * 0.0
        for value in (out.logits, out.auxiliary_loss):
            if value is not None:
                copy = value.detach().clone()
                dist.broadcast(copy, group_src=0, group=self.group)
                received.append(copy + value.sum() * 0.0 + nothing)
        return SlideOutput(received[0], None, received[1] if len(received) > 1 else None)


def _in_bag_order(lengths: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The way from rows in the order of ranks to rows in the order of bags.

    Args:
        lengths: int64 [T, B], rows of each rank and bag.
        device: where the result lies.

    Returns:
        (indices int64 [sum N], cu_seqlens int64 [B + 1] of the whole bags).
    """
    ranks, n_bags = lengths.shape
    bag_of_row = torch.repeat_interleave(torch.arange(n_bags).repeat(ranks), lengths.flatten())
    whole = bounds_on(device, lengths.sum(0).tolist())
    # Stable: within a bag the ranks' tiles stay in the order of the slide, which aggregators with positions need.
    return bag_of_row.argsort(stable=True).to(device), whole


def shard_tiles(model: Any, mesh: TileMesh, policy: TileParallelPolicy | None = None) -> Handle[SharedForward | None]:
    """Let the ranks of a tile group share each bag, in place: same state_dict, gradients of one process.

    Afterwards `model` takes this rank's tiles of each of the group's bags, and every rank returns the bags' logits.
    Train-mode BatchNorm of the encoder normalises over the whole bag. Weight the loss by 1 / T for an engine that sums
    gradients, by W / T for one that takes the mean over its W ranks (DDP, DeepSpeed, FSDP2), T = `mesh.tile_size`.
    Call it before the model is partitioned or wrapped by an engine.

    Args:
        model: has attributes `encoder` (tiles -> features [N, D]) and `aggregator` (StackedBags -> SlideOutput), as
            SlideModel.
        mesh: the mesh of `tile_mesh`.
        policy: names the exchange; its defaults otherwise.

    Returns:
        A handle; `handle.remove()` undoes it. Its `forward` is the aggregator's: the `traffic`, and the `seed` to set
        before each step; None where the group is one rank.

    Raises:
        ValueError: the aggregator is shared already, or cannot be "sharded".
    """
    policy = policy or TileParallelPolicy(mesh.tile_size)
    aggregator = model.aggregator
    if isinstance(aggregator.__dict__.get("forward"), SharedForward):
        raise ValueError(f"{type(aggregator).__name__} must not be shared twice. HINT: handle.remove() first.")
    exchange = choose_exchange(aggregator, policy.aggregator)
    if mesh.group is None:
        return Handle[SharedForward | None](aggregator, None, "tile parallelism")
    undo_norms = share_norms(model.encoder, mesh.group)
    forward = SharedForward(aggregator, mesh.group, exchange)
    handle = Handle[SharedForward | None](aggregator, forward, "tile parallelism", undo_norms)
    logger.info(
        "tile-parallel: %d ranks share each bag, %s exchange, %d norms over the bag",
        mesh.tile_size,
        exchange,
        len(batch_norms(model.encoder)),
    )
    return handle


def choose_exchange(aggregator: nn.Module, wanted: str) -> str:
    """The exchange that "auto" means for this aggregator, or the wanted one.

    Raises:
        ValueError: "sharded" of an aggregator that does more than pool.
    """
    can = isinstance(aggregator, PooledAggregator)
    if wanted == "sharded" and not can:
        raise ValueError(
            f'tile_parallel.aggregator must be "replicated" or "gather" for {type(aggregator).__name__}, which does '
            'more than pool the rows of a bag, got "sharded"'
        )
    return ("sharded" if can else "replicated") if wanted == "auto" else wanted
