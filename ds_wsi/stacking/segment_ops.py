"""Sum, mean, max, softmax and top-k over each bag of a stack: rows [sum N, ...] and cu_seqlens int64 [B + 1].

Half-precision rows are accumulated in float32 and returned in their own dtype. The order of the sums is fixed on the
CPU, and on CUDA under `torch.use_deterministic_algorithms`, which `index_add` obeys.
"""

from collections.abc import Sequence
from itertools import repeat

import torch
from torch import Tensor

from ds_wsi.runtime.numerics import widened
from ds_wsi.stacking.stacked_bags import bounds_of, bounds_on, lengths_of


def segment_ids(cu_seqlens: Tensor, rows: int) -> Tensor:
    """The bag of each of the stack's `rows`, sum N, which are given because the host would wait for them: int64."""
    lengths = cu_seqlens.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=cu_seqlens.device), lengths, output_size=rows)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of each bag's rows: [B, ...]."""
    wide = widened(values)
    sums = wide.new_zeros((cu_seqlens.numel() - 1, *values.shape[1:]))
    return sums.index_add(0, segment_ids(cu_seqlens, len(wide)), wide).to(values.dtype)


def segment_mean(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean of each bag's rows: [B, ...]."""
    wide = widened(values)
    lengths = cu_seqlens.diff().to(wide.dtype).reshape(-1, *[1] * (values.dim() - 1))
    return (segment_sum(wide, cu_seqlens) / lengths).to(values.dtype)


def segment_max(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Largest of each bag's rows: [B, ...]; equal maxima share the gradient evenly, as in `torch.amax`."""
    ids = segment_ids(cu_seqlens, len(values)).reshape(-1, *[1] * (values.dim() - 1)).expand_as(values)
    lowest = values.new_full((cu_seqlens.numel() - 1, *values.shape[1:]), float("-inf"))
    return lowest.scatter_reduce(0, ids, values, "amax", include_self=False)


def segment_softmax(scores: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Softmax of scores [sum N, ...] within each bag; stable: each bag's largest score is subtracted first."""
    wide = widened(scores)
    ids = segment_ids(cu_seqlens, len(wide))
    # The shift cancels in the quotient, so no gradient has to pass through the maximum.
    exponentials = (wide - segment_max(wide.detach(), cu_seqlens)[ids]).exp()
    return (exponentials / segment_sum(exponentials, cu_seqlens)[ids]).to(scores.dtype)


def segment_topk(values: Tensor, cu_seqlens: Tensor, k: int | Sequence[int]) -> tuple[Tensor, Tensor]:
    """The k largest of each bag's values [sum N]; nothing is computed from them, so half precision loses nothing.

    Args:
        values: [sum N].
        cu_seqlens: int64 [B + 1].
        k: how many of every bag, or of each; a bag that is shorter gives all it has.

    Returns:
        The rows, int64 [K]: bag after bag, the largest value first, equal values by their index; and their
        cu_seqlens, int64 [B + 1].
    """
    ids, lengths = segment_ids(cu_seqlens, len(values)), lengths_of(cu_seqlens)
    by_value = values.detach().sort(descending=True, stable=True).indices
    order = by_value[ids[by_value].sort(stable=True).indices]
    # How many are taken is known on the host: a mask over the rows would wait for the device to count them.
    bounds = bounds_on(values.device, map(min, lengths, repeat(k) if isinstance(k, int) else k))
    count = bounds_of(bounds)[-1]
    segments = segment_ids(bounds, count)
    positions = cu_seqlens[segments] + torch.arange(count, device=values.device) - bounds[segments]
    return order[positions], bounds
