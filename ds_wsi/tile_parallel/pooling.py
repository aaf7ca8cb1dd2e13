"""Pooling of a bag whose instances lie on several ranks: partial sums are merged, O(D) bytes for a bag of any length.

With m = max_k e_k over all ranks, s = sum_k exp(e_k - m) and z = sum_k exp(e_k - m) h_k / s, both sums are over the
ranks too (online softmax; Milakov and Gimelshein, arXiv 1805.02867). The shift m cancels in the quotient: no gradient
passes through it.
"""

from typing import Any

import torch
from torch import Tensor

from ds_wsi.stacking.segment_ops import segment_ids, segment_max, segment_sum
from ds_wsi.tile_parallel.collectives import Traffic, max_over, sum_over


def pool_shards(
    pooling: str, embedded: Tensor, scores: Tensor | None, cu_seqlens: Tensor, group: Any, traffic: Traffic
) -> tuple[Tensor, Tensor | None]:
    """Pool bags of which this rank has the rows `embedded`, some of them perhaps none.

    Args:
        pooling: "attention", "mean" or "max".
        embedded: [n, D'].
        scores: [n, M] of "attention", else None.
        cu_seqlens: int64 [B + 1], of this rank's rows.
        group: the ranks that share the bags. One all-reduce of maxima and one of sums (mean: the latter alone), and one
            of gradients in backward.

    Returns:
        (pooled [B, M, D'] float32 or float64, the same on all ranks; attention [n, M] of this rank's rows, or None).
    """
    if scores is not None:
        return _attention(scores, embedded, cu_seqlens, group, traffic)
    wide = embedded if embedded.dtype == torch.float64 else embedded.float()
    if pooling == "max":
        largest = max_over(segment_max(wide.detach(), cu_seqlens), group, traffic)
        counted = (wide.detach() == largest[segment_ids(cu_seqlens, len(wide))]).to(
            wide.dtype
        )  # equal maxima share evenly
        values = wide * counted
    else:
        values, counted = wide, torch.ones_like(wide[:, :1])
    fused = torch.cat([segment_sum(values, cu_seqlens), segment_sum(counted, cu_seqlens)], 1)
    sums, counts = sum_over(fused, group, traffic).split([values.shape[1], counted.shape[1]], 1)
    return (sums / counts.detach()).unsqueeze(1), None


def _attention(
    scores: Tensor, embedded: Tensor, cu_seqlens: Tensor, group: Any, traffic: Traffic
) -> tuple[Tensor, Tensor]:
    wide = scores if scores.dtype == torch.float64 else scores.float()
    largest = max_over(segment_max(wide.detach(), cu_seqlens), group, traffic)  # [B, M]
    ids = segment_ids(cu_seqlens, len(wide))
    weights = (wide - largest[ids]).exp()  # [n, M]
    n_bags, branches, width = len(largest), wide.shape[1], embedded.shape[1]
    values = [segment_sum(weight.unsqueeze(1) * embedded, cu_seqlens) for weight in weights.unbind(1)]  # [B, D'] each
    fused = torch.cat([*values, segment_sum(weights, cu_seqlens)], 1)
    sums, totals = sum_over(fused, group, traffic).split([branches * width, branches], 1)
    pooled = sums.view(n_bags, branches, width) / totals.unsqueeze(-1)
    return pooled, (weights / totals[ids]).detach()
