"""Aggregators that pool a bag in one weighted sum: the contract that lets a bag lie in chunks or on several ranks.

h_k = embed(x_k); e_k = scores(h_k); a = softmax(e); z_m = sum_k a_km h_k; logits = head(z).
`embed` and `scores` see one instance at a time, `head` sees the pooled bags alone: whoever merges partial softmax sums
(`ds_wsi.tile_parallel`) computes the same without holding the bag.
"""

import torch
from torch import Tensor, nn

from ds_wsi.models.output import SlideOutput
from ds_wsi.stacking.segment_ops import segment_max, segment_mean, segment_softmax, segment_sum
from ds_wsi.stacking.stacked_bags import StackedBags


class PooledAggregator(nn.Module):
    """Base of aggregators of this form. Subclasses define `pooling`, `head`, and what else they need.

    Attributes:
        pooling: "attention", "mean" or "max" over the instances of a bag.
        packed: bags of a stack are computed together.
    """

    pooling = "attention"
    packed = True

    def embed(self, features: Tensor) -> Tensor:
        """Features [N, D] to what is pooled, [N, D']: the identity unless overridden."""
        return features

    def scores(self, embedded: Tensor) -> Tensor:
        """Attention scores [N, M] of embedded instances [N, D'], for M branches."""
        raise NotImplementedError

    def head(self, pooled: Tensor) -> Tensor:
        """Pooled bags [B, M, D'] (M = 1 without attention) to logits [B, C]."""
        raise NotImplementedError

    def forward(self, bags: StackedBags) -> SlideOutput:
        """Pool features [sum N, D] to logits [B, C] and attention [sum N], or [sum N, M] of several branches."""
        embedded = self.embed(bags.values)
        if self.pooling != "attention":
            pool = segment_mean if self.pooling == "mean" else segment_max
            return SlideOutput(self.head(pool(embedded, bags.cu_seqlens).unsqueeze(1)), None)
        attention, pooled = attention_pool(embedded, self.scores(embedded), bags.cu_seqlens)
        return SlideOutput(self.head(pooled), attention.squeeze(-1))


def attention_pool(embedded: Tensor, scores: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [sum N, M], the softmax of scores [sum N, M] within each bag, and the bags [B, M, D'] it pools."""
    attention = segment_softmax(scores, cu_seqlens)
    # A branch at a time: [sum N, M, D'] would be the largest tensor of all.
    pooled = [segment_sum(weight.unsqueeze(-1) * embedded, cu_seqlens) for weight in attention.unbind(1)]
    return attention, torch.stack(pooled, 1)
