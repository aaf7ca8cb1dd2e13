"""Collectives that autograd sees, each with its adjoint as backward: the gradient of the SUM of all ranks' losses.

[Note: one rule for all exchanges] Every rank of a tile group computes the same loss L of the group's bags and calls
backward on it. The adjoint of an all-gather is a reduce-scatter (sum), that of an all-reduce (sum) an all-reduce (sum).
Then what a rank finds for its parameters is its part of the gradient of T L: summed over the T ranks of the group, the
encoder's parts and the aggregator's copies both make T times the gradient of L, each tile and each parameter counted
alike. A loss weighted by 1 / T is therefore exact under an engine that sums, by W / T under one that takes the mean.

torch.distributed.nn.functional is not used: it is deprecated, and some of its backwards were wrong (pytorch #120386).
Only SUM and MAX are: gloo's AVG is wrong (pytorch #162338).
"""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Traffic:
    """Bytes that this rank hands to collectives, and how many it calls, by name; forward and backward.

    Attributes:
        bytes, calls: counted since the start or `clear`.
    """

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def count(self, name: str, tensor: Tensor) -> None:
        """Book a payload."""
        self.bytes[name] += tensor.numel() * tensor.element_size()
        self.calls[name] += 1

    def clear(self) -> None:
        """Start anew."""
        self.bytes.clear()
        self.calls.clear()


def size_of(group: Any) -> int:
    """Ranks in `group`; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: Any) -> int:
    """This rank in `group`; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def max_over(values: Tensor, group: Any, traffic: Traffic) -> Tensor:
    """Elementwise maximum over the ranks, without gradient."""
    values = values.detach().clone()
    if group is not None:
        traffic.count("all_reduce max", values)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
    return values


def sum_over(values: Tensor, group: Any, traffic: Traffic) -> Tensor:
    """Elementwise sum over the ranks; backward sums the gradient over the ranks."""
    return values if group is None else _SumOver.apply(values, group, traffic)


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any, traffic: Traffic) -> Tensor:
        ctx.group, ctx.traffic = group, traffic
        return _summed(values, group, traffic)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _summed(grads[0], ctx.group, ctx.traffic), None, None


def _summed(values: Tensor, group: Any, traffic: Traffic) -> Tensor:
    total = values.detach().clone(memory_format=torch.contiguous_format)
    traffic.count("all_reduce sum", total)
    dist.all_reduce(total, group=group)
    return total


def share_numbers(numbers: list[int], group: Any, device: torch.device, traffic: Traffic) -> Tensor:
    """Every rank's integers: int64 [T, n], on the host."""
    mine = torch.tensor(numbers, dtype=torch.int64)
    if group is None:
        return mine.unsqueeze(0)
    mine = mine.to(device)
    everyone = mine.new_empty(size_of(group), len(numbers))
    traffic.count("all_gather numbers", mine)
    dist.all_gather_into_tensor(everyone, mine.unsqueeze(0), group=group)
    return everyone.cpu()


def all_rows(rows: Tensor, counts: list[int], group: Any, traffic: Traffic) -> Tensor:
    """The ranks' rows [n_t, D], one after the other: [sum n, D]; backward gives each rank its rows' summed gradients.

    Ranks send as many rows as the longest has: shares within one tile of each other waste next to nothing.
    """
    return rows if group is None else _AllRows.apply(rows, counts, group, traffic)


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: Any, traffic: Traffic) -> Tensor:
        ctx.counts, ctx.group, ctx.traffic = counts, group, traffic
        mine = rows.new_zeros(max(counts), *rows.shape[1:])
        mine[: len(rows)] = rows
        everyone = mine.new_empty(len(counts) * len(mine), *rows.shape[1:])
        traffic.count("all_gather features", mine)
        dist.all_gather_into_tensor(everyone, mine, group=group)
        return torch.cat([part[:count] for part, count in zip(everyone.chunk(len(counts)), counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        counts, longest = ctx.counts, max(ctx.counts)
        padded = grads[0].new_zeros(len(counts), longest, *grads[0].shape[1:])
        for part, gradient in zip(padded, grads[0].split(counts), strict=True):
            part[: len(gradient)] = gradient
        mine = padded.new_empty(1, *padded.shape[1:])
        ctx.traffic.count("reduce_scatter gradients", padded)
        dist.reduce_scatter_tensor(mine, padded, group=ctx.group)
        return mine[0, : counts[rank_in(ctx.group)]], None, None, None


def rows_to_first(rows: Tensor, counts: list[int], group: Any, traffic: Traffic) -> Tensor:
    """The ranks' rows on the group's first rank, [sum n, D]; elsewhere a zero [1, D] that stands for them in the graph.

    Backward is the paper's: the first rank sends each rank the gradient of its rows (Campanella et al., section 2.2);
    returning it from here is what their pseudo-loss, the sum of features times that gradient, does.
    """
    return rows if group is None else _RowsToFirst.apply(rows, counts, group, traffic)


class _RowsToFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: Any, traffic: Traffic) -> Tensor:
        ctx.counts, ctx.group, ctx.traffic, ctx.shape, ctx.kind = counts, group, traffic, rows.shape, rows.dtype
        if rank_in(group) > 0:
            _exchange([(dist.isend, rows.contiguous(), 0)], group, traffic, "gather features")
            return rows.new_zeros(1, *rows.shape[1:])
        parts = [rows, *(rows.new_empty(count, *rows.shape[1:]) for count in counts[1:])]
        received = [(dist.irecv, part, rank) for rank, part in enumerate(parts) if rank]
        _exchange(received, group, traffic, "gather features")
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        group, traffic, grad = ctx.group, ctx.traffic, grads[0]
        if rank_in(group) > 0:
            mine = grad.new_empty(ctx.shape, dtype=ctx.kind)
            _exchange([(dist.irecv, mine, 0)], group, traffic, "scatter gradients")
            return mine, None, None, None
        parts = list(grad.contiguous().split(ctx.counts))
        sent = [(dist.isend, part.contiguous(), rank) for rank, part in enumerate(parts) if rank]
        _exchange(sent, group, traffic, "scatter gradients")
        return parts[0], None, None, None


def _exchange(pairs: list[tuple[Any, Tensor, int]], group: Any, traffic: Traffic, name: str) -> None:
    """Send or receive what has any bytes, all at once; what is sent is counted."""
    operations = []
    for verb, tensor, peer in pairs:
        if tensor.numel():
            operations.append(dist.P2POp(verb, tensor, group=group, group_peer=peer))
            if verb is dist.isend:
                traffic.count(name, tensor)
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:  # noqa: D102
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # noqa: D102
        return grads[0] * ctx.factor, None
