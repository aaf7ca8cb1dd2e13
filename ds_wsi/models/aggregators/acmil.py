"""Attention-challenging pooling: several branches, and the instances they like best are hidden at random in training.

Source: Zhang et al., "Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification", ECCV 2024
(arXiv 2311.07125): multiple branch attention and stochastic top-k instance masking, with gated attention.
"""

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_wsi.models.aggregators.gated_attention import GatedAttention
from ds_wsi.models.aggregators.pooled import PooledAggregator, attention_pool
from ds_wsi.models.output import SlideOutput
from ds_wsi.runtime.numerics import widened
from ds_wsi.stacking.randomness import bag_draws
from ds_wsi.stacking.segment_ops import segment_sum, segment_topk
from ds_wsi.stacking.stacked_bags import StackedBags, lengths_of


class ACMIL(PooledAggregator):
    """M gated attentions over h_k = ReLU(W x_k); the bag is pooled by their mean, and classified.

    In training each branch's `masked` highest scores are looked up and a random `mask_share` of them (rounded down) set
    to minus infinity; the draws come from torch's default generator, bag by bag, in order. With labels the auxiliary
    loss is the mean over the branches of the cross-entropy of a classifier each, plus the mean cosine similarity of the
    branches' attentions, which makes them differ.

    Args:
        in_dim: width D of the features.
        num_classes: C.
        embed_dim: width D' of h.
        hidden_dim: width of the attention's hidden layer.
        branches: M.
        masked: the number of instances among which a branch loses some; 0 masks none.
        mask_share: the share of them that it loses, in [0, 1): a bag keeps at least one instance.
        dropout: the share of the classifiers' input that is dropped in training.
    """

    needs_labels = True

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        embed_dim: int = 256,
        hidden_dim: int = 128,
        branches: int = 5,
        masked: int = 10,
        mask_share: float = 0.6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if branches < 1 or masked < 0 or not 0 <= mask_share < 1:
            raise ValueError(
                f"branches must be >= 1, masked >= 0 and mask_share in [0, 1), got {branches}, {masked}, {mask_share}"
            )
        self.masked, self.mask_share = masked, mask_share
        self.embedding = nn.Sequential(nn.Linear(in_dim, embed_dim, bias=False), nn.ReLU())
        self.attention = GatedAttention(embed_dim, hidden_dim, branches)
        self.dropout = nn.Dropout(dropout)
        self.branch_classifiers = nn.ModuleList(nn.Linear(embed_dim, num_classes) for _ in range(branches))
        self.classifier = nn.Linear(embed_dim, num_classes)

    def embed(self, features: Tensor) -> Tensor:
        """Features [N, D] to h [N, D']."""
        return self.embedding(features)

    def scores(self, embedded: Tensor) -> Tensor:
        """Attention scores before masks and the softmax: [N, M]."""
        return self.attention(embedded)

    def head(self, pooled: Tensor) -> Tensor:
        """Logits [B, C] of pooled bags [B, M, D']; pooling is linear: their mean is what the mean attention pools."""
        return self.classifier(self.dropout(pooled.mean(1)))

    def forward(self, bags: StackedBags, labels: Tensor | None = None) -> SlideOutput:
        """Pool features [sum N, D] to logits and the branches' mean attention [sum N]; with labels, the loss too."""
        embedded = self.embed(bags.values)
        scores = self.scores(embedded)
        if self.training and self.masked:
            scores = scores.masked_fill(self.draw_masks(scores, bags.cu_seqlens), float("-inf"))
        attention, pooled = attention_pool(embedded, scores, bags.cu_seqlens)
        loss = None if labels is None else self.branch_loss(attention, pooled, bags.cu_seqlens, labels)
        return SlideOutput(self.head(pooled), attention.mean(1), loss)

    def draw_masks(self, scores: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The instances that each branch loses in this step: bool [sum N, M]."""
        branches = scores.shape[1]
        sizes = [min(length, self.masked) for length in lengths_of(cu_seqlens)]
        drawn = []
        for bag, size in enumerate(sizes):
            with bag_draws(bag, scores.device):
                drawn.append(torch.rand(size, branches, device=scores.device))
        draws = torch.cat(drawn)
        dropped = [int(size * self.mask_share) for size in sizes]
        masks = torch.zeros_like(scores, dtype=torch.bool)
        for branch in range(branches):
            highest, bounds = segment_topk(scores[:, branch], cu_seqlens, self.masked)
            lost, _ = segment_topk(draws[:, branch], bounds, dropped)
            masks[highest[lost], branch] = True
        return masks

    def branch_loss(self, attention: Tensor, pooled: Tensor, cu_seqlens: Tensor, labels: Tensor) -> Tensor:
        """Classification and similarity of the branches: [B]."""
        branches = zip(self.branch_classifiers, pooled.unbind(1), strict=True)
        guesses = [widened(classifier(self.dropout(branch))) for classifier, branch in branches]
        loss = torch.stack([F.cross_entropy(guess, labels, reduction="none") for guess in guesses]).mean(0)
        pairs = list(combinations(range(len(guesses)), 2))
        if not pairs:
            return loss
        weights = widened(attention)  # the squares of a large bag's weights underflow in half precision
        norms = segment_sum(weights.square(), cu_seqlens).sqrt()  # [B, M]
        cosines = [
            segment_sum(weights[:, one] * weights[:, other], cu_seqlens) / (norms[:, one] * norms[:, other])
            for one, other in pairs
        ]
        return loss + torch.stack(cosines).mean(0)
