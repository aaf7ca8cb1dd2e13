"""Sum, mean, max and softmax over each bag of a stack: rows [sum N, ...] and cu_seqlens int64 [B + 1].

Half-precision rows are accumulated in float32 and returned in their own dtype.
"""

import torch
from torch import Tensor


def segment_ids(cu_seqlens: Tensor) -> Tensor:
    """The bag of each row: int64 [sum N]."""
    lengths = cu_seqlens.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=cu_seqlens.device), lengths)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of each bag's rows: [B, ...]."""
    wide = _widened(values)
    sums = wide.new_zeros((cu_seqlens.numel() - 1, *values.shape[1:]))
    return sums.index_add(0, segment_ids(cu_seqlens), wide).to(values.dtype)


def segment_mean(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean of each bag's rows: [B, ...]."""
    wide = _widened(values)
    lengths = cu_seqlens.diff().to(wide.dtype).reshape(-1, *[1] * (values.dim() - 1))
    return (segment_sum(wide, cu_seqlens) / lengths).to(values.dtype)


def segment_max(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Largest of each bag's rows: [B, ...]; equal maxima share the gradient evenly, as in `torch.amax`."""
    ids = segment_ids(cu_seqlens).reshape(-1, *[1] * (values.dim() - 1)).expand_as(values)
    lowest = values.new_full((cu_seqlens.numel() - 1, *values.shape[1:]), float("-inf"))
    return lowest.scatter_reduce(0, ids, values, "amax", include_self=False)


def segment_softmax(scores: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Softmax of scores [sum N, ...] within each bag; stable: each bag's largest score is subtracted first."""
    wide = _widened(scores)
    ids = segment_ids(cu_seqlens)
    # The shift cancels in the quotient, so no gradient has to pass through the maximum.
    exponentials = (wide - segment_max(wide.detach(), cu_seqlens)[ids]).exp()
    return (exponentials / segment_sum(exponentials, cu_seqlens)[ids]).to(scores.dtype)


def _widened(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
