"""Multi-head attention pooling whose scores pass between similar instances.

Source: Tang et al., "Revisiting End-to-End Learning with Slide-level Supervision in Computational Pathology", 2025
(arXiv 2506.02408), section 3.2: multi-head local attention (equation 3) and the global attention plus module
(equation 4), with the settings of its end-to-end experiments.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_wsi.models.aggregators.gated_attention import xavier_linears
from ds_wsi.models.aggregators.pooled import attention_pool
from ds_wsi.models.output import SlideOutput
from ds_wsi.stacking.stacked_bags import StackedBags, lengths_of


class ABMILX(nn.Module):
    """Each head j scores its part H_j of h: A_j = MLP(H_j), refined to A_j + alpha U_j A_j, softmax, Z_j = sum a H_j.

    U_j = softmax(Q_j K_j^T / sqrt(d)) relates a bag's instances to each other, so that time grows as N^2 (memory as N:
    U_j is never held). The heads' Z_j together, through a linear map, a residual MLP and a norm, give the logits.
    Attention is [sum N, heads].

    Args:
        in_dim: width D of the features.
        num_classes: C.
        embed_dim: width D' of h, a multiple of `heads`.
        heads: parts of h, D' / heads wide each; they share all weights.
        dropout: the share of h that is dropped in training.

    Attributes:
        packed: bags of a stack are computed together, but for U, which has no parameters.
    """

    packed = True

    def __init__(
        self, in_dim: int, num_classes: int, embed_dim: int = 512, heads: int = 8, dropout: float = 0.25
    ) -> None:
        super().__init__()
        if embed_dim % heads:
            raise ValueError(f"embed_dim must be a multiple of heads, got {embed_dim} and {heads}")
        self.heads, width = heads, embed_dim // heads
        self.embedding = nn.Sequential(
            nn.LayerNorm(in_dim, bias=False), nn.Linear(in_dim, embed_dim, bias=False), nn.GELU(), nn.Dropout(dropout)
        )
        self.local = nn.Sequential(nn.Linear(width, width, bias=False), nn.GELU(), nn.Linear(width, 1, bias=False))
        self.norm_heads = nn.LayerNorm(width)
        self.query_key = nn.Linear(width, 2 * width, bias=False)
        self.alpha = nn.Parameter(torch.ones(()))
        self.projection = nn.Linear(embed_dim, embed_dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(embed_dim, 4 * embed_dim), nn.GELU(), nn.Linear(4 * embed_dim, embed_dim))
        self.norm = nn.LayerNorm(embed_dim, bias=False)
        self.classifier = nn.Linear(embed_dim, num_classes, bias=False)
        xavier_linears(self)

    def forward(self, bags: StackedBags) -> SlideOutput:
        """Pool features [sum N, D] to logits [B, C] and attention [sum N, heads]."""
        parts = self.embedding(bags.values).unflatten(1, (self.heads, -1))  # [sum N, heads, d]
        scores = self.local(parts).squeeze(2)  # [sum N, heads]
        scores = scores + self.spread(parts, scores, bags)
        pooled, attention = [], []
        for part, score in zip(parts.unbind(1), scores.split(1, 1), strict=True):
            weights, pooled_part = attention_pool(part, score, bags.cu_seqlens)
            attention.append(weights)
            pooled.append(pooled_part.squeeze(1))
        slides = self.projection(torch.cat(pooled, 1))
        slides = self.norm(slides + self.mlp(slides))
        return SlideOutput(self.classifier(slides), torch.cat(attention, 1))

    def spread(self, parts: Tensor, scores: Tensor, bags: StackedBags) -> Tensor:
        """Equation 4: alpha U_j A_j of each bag and head, [sum N, heads]."""
        query, key = self.query_key(self.norm_heads(parts)).chunk(2, -1)
        # As wide as keys are, since only then the kernels that do not hold U are there.
        value = F.pad((self.alpha * scores).unsqueeze(2), (0, query.shape[2] - 1)).to(query.dtype)
        lengths = lengths_of(bags.cu_seqlens)
        spread = [
            F.scaled_dot_product_attention(*(each.transpose(0, 1).unsqueeze(0) for each in bag))[0, :, :, 0].T
            for bag in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        ]
        return torch.cat(spread)
