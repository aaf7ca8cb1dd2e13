"""Re-embedded regions: tiles attend to those of their region, regions to each other, then attention pools.

Source: Tang et al., "Feature Re-Embedding: Towards Foundation Model-Level Performance in Computational Pathology",
CVPR 2024, section 3: regional (R-MSA) and cross-region (CR-MSA) self-attention.
"""

import math

import torch
from torch import Tensor, nn

from ds_wsi.models.aggregators.gated_attention import xavier_linears
from ds_wsi.models.aggregators.per_bag import PerBagAggregator
from ds_wsi.runtime.numerics import widened

BLOCK_ELEMENTS = 2**25  # of attention maps that are computed at once


class RRTMIL(PerBagAggregator):
    """h_k = ReLU(W x_k), re-embedded by x + R-MSA(LN x), x + CR-MSA(LN x) and LN, is pooled by attention.

    Instances lie in a square, row by row, zeros after the last; it is cut into regions x regions squares. Within one,
    time and memory grow as the square of its instances: (N / regions^2)^2, as in the original.

    Args:
        in_dim: width D of the features.
        num_classes: C.
        embed_dim: width D' of h, a multiple of `heads`.
        heads: heads of both attentions.
        regions: a side of the square has this many.
        epeg_kernel: length of the convolution over the attention maps (EPEG), odd.
        representatives: instances that stand for a region in CR-MSA.
        dropout: the share of h that is dropped in training.
        attention_dropout: the share of what each attention adds that is dropped in training.

    Attributes:
        order_matters: regions are of instances that follow each other.
    """

    order_matters = True

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        embed_dim: int = 512,
        heads: int = 8,
        regions: int = 8,
        epeg_kernel: int = 15,
        representatives: int = 3,
        dropout: float = 0.25,
        attention_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if embed_dim % heads or epeg_kernel % 2 == 0:
            raise ValueError(
                f"embed_dim must be a multiple of heads and epeg_kernel odd, got {embed_dim}, {heads}, {epeg_kernel}"
            )
        self.regions = regions
        self.embedding = nn.Sequential(nn.Linear(in_dim, embed_dim), nn.ReLU(), nn.Dropout(dropout))
        self.norm_1, self.norm_2, self.norm = (nn.LayerNorm(embed_dim) for _ in range(3))
        self.regional = RegionAttention(embed_dim, heads, epeg_kernel, attention_dropout)
        self.across = RegionAttention(embed_dim, heads, None, attention_dropout)
        self.representing = nn.Parameter(torch.empty(embed_dim, representatives))
        self.attention = nn.Sequential(nn.Linear(embed_dim, 128, bias=False), nn.ReLU(), nn.Linear(128, 1, bias=False))
        self.classifier = nn.Linear(embed_dim, num_classes)
        xavier_linears(self)
        nn.init.kaiming_uniform_(self.representing, a=math.sqrt(5))

    def forward_bag(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, D] of one bag to logits [C] and attention [N]."""
        embedded = self.embedding(features)
        embedded = embedded + self._unfold(self.regional(self._fold(self.norm_1(embedded))), len(embedded))
        embedded = embedded + self._unfold(self._cross(self._fold(self.norm_2(embedded))), len(embedded))
        embedded = self.norm(embedded)
        attention = self.attention(embedded).softmax(0)  # [N, 1]
        # A row, not a vector: ZeRO-3's linear layers differentiate no vectors.
        logits = self.classifier((attention * embedded).sum(0, keepdim=True)).squeeze(0)
        return logits, attention.squeeze(1)

    def _fold(self, instances: Tensor) -> Tensor:
        """Instances [N, D'] to regions [R, L, D'], row by row, with zeros after the last instance."""
        side = math.isqrt(len(instances) - 1) + 1
        side += -side % self.regions
        square = nn.functional.pad(instances, (0, 0, 0, side * side - len(instances)))
        cells = square.unflatten(0, (self.regions, side // self.regions, self.regions, side // self.regions))
        return cells.transpose(1, 2).flatten(0, 1).flatten(1, 2)

    def _unfold(self, regions: Tensor, count: int) -> Tensor:
        """Regions [R, L, D'] back to the first `count` instances, [N, D']."""
        size = math.isqrt(regions.shape[1])
        cells = regions.unflatten(0, (self.regions, self.regions)).unflatten(2, (size, size))
        return cells.transpose(1, 2).flatten(0, 3)[:count]

    def _cross(self, regions: Tensor) -> Tensor:
        """CR-MSA: the regions' representatives attend to each other, and their results return to the instances."""
        # Widened: in half precision the divisor below is 0 where a region is all padding.
        logits = widened(regions @ self.representing.to(regions.dtype))  # [R, L, K]
        gathered = logits.softmax(1).mT.to(regions.dtype) @ regions  # [R, K, D']
        mixed = self.across(gathered.transpose(0, 1)).transpose(0, 1)
        lowest, highest = logits.amin(1, keepdim=True), logits.amax(1, keepdim=True)
        shares = (logits - lowest) / (highest - lowest + 1e-8) * logits.softmax(2)
        return shares.to(mixed.dtype) @ mixed


class RegionAttention(nn.Module):
    """Self-attention within each region; EPEG adds to the attention maps their convolution along the queries.

    Args:
        dim: width of the instances.
        heads: heads, dim / heads wide each.
        epeg_kernel: length of the convolution, None for none.
        dropout: the share of the result that is dropped in training.
    """

    def __init__(self, dim: int, heads: int, epeg_kernel: int | None, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.epeg = (
            nn.Conv2d(heads, heads, (epeg_kernel, 1), padding=(epeg_kernel // 2, 0), groups=heads)
            if epeg_kernel
            else None
        )
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, regions: Tensor) -> Tensor:
        """Regions [R, L, D'] to the same shape."""
        qkv = self.qkv(regions).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, R, h, L, d]
        # A few regions at a time: without gradients the maps of the others need not exist.
        size = max(1, BLOCK_ELEMENTS // (self.heads * regions.shape[1] ** 2))
        blocks = zip(*(part.split(size) for part in qkv.unbind()), strict=True)
        mixed = torch.cat([self._attend(*block) for block in blocks])
        return self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logits = (query * query.shape[-1] ** -0.5) @ key.mT  # [R, h, L, L]
        if self.epeg is not None:
            logits = logits + self.epeg(logits)
        return logits.softmax(-1).to(value.dtype) @ value
