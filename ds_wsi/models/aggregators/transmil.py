"""Transformer pooling: two layers of approximate self-attention, and positions from convolutions between them.

Sources: Shao et al., "TransMIL: Transformer based Correlated Multiple Instance Learning for Whole Slide Image
Classification", NeurIPS 2021, algorithms 2 and 3; Xiong et al., "Nystromformer", AAAI 2021, equations 13 to 15.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_wsi.models.aggregators.per_bag import PerBagAggregator
from ds_wsi.runtime.numerics import widened

PINV_ITERATIONS = 6
RESIDUAL_KERNEL = 33


class TransMIL(PerBagAggregator):
    """A class token and the instances h_k = ReLU(W x_k), completed to a square, go through the transformer.

    Attention is the class token's in the second layer: mean over the heads, negative weights (an approximation may have
    them) as zero, those of the instances repeated in the square added up, normalised to sum to 1. No gradient passes
    through it.

    Args:
        in_dim: width D of the features.
        num_classes: C.
        embed_dim: width D' of h, a multiple of `heads`.
        heads: heads of the attention, D' / heads wide each.
        landmarks: landmarks of the attention; the original has D' / 2.
        dropout: the share of what each attention adds that is dropped in training.

    Attributes:
        order_matters: convolutions are over the square, in which instances that follow each other are neighbours.
    """

    order_matters = True

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        embed_dim: int = 512,
        heads: int = 8,
        landmarks: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if embed_dim % heads:
            raise ValueError(f"embed_dim must be a multiple of heads, got {embed_dim} and {heads}")
        self.embedding = nn.Sequential(nn.Linear(in_dim, embed_dim), nn.ReLU())
        self.class_token = nn.Parameter(torch.randn(1, embed_dim))
        self.norm_1, self.norm_2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.attention_1 = NystromAttention(embed_dim, heads, landmarks, dropout)
        self.attention_2 = NystromAttention(embed_dim, heads, landmarks, dropout)
        self.positions = PyramidPositions(embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.classifier = nn.Linear(embed_dim, num_classes)

    def forward_bag(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, D] of one bag to logits [C] and attention [N]."""
        count, side = len(features), math.isqrt(len(features) - 1) + 1  # the square root, rounded up
        embedded = self.embedding(features)
        square = torch.cat([embedded, embedded[: side * side - count]])
        tokens = torch.cat([self.class_token.to(square.dtype), square])
        tokens = tokens + self.attention_1(self.norm_1(tokens))[0]
        tokens = self.positions(tokens, side)
        added, weights = self.attention_2(self.norm_2(tokens))
        # All that follows sees one token at a time: the class token's result is all there is to compute.
        # A row, not a vector: ZeRO-3's linear layers differentiate no vectors.
        logits = self.classifier(self.norm(tokens[:1] + added[:1])).squeeze(0)
        attention = weights[1 : count + 1].clone()
        attention[: side * side - count] += weights[count + 1 :]
        return logits, attention / attention.sum().clamp_min(torch.finfo(attention.dtype).tiny)


class PyramidPositions(nn.Module):
    """Algorithm 3 (PPEG): depthwise convolutions of 7, 5 and 3 over the square, and the square itself, added up."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim) for k in (7, 5, 3))

    def forward(self, tokens: Tensor, side: int) -> Tensor:
        """Class token and square [1 + side * side, D'] to the same shape; the class token passes."""
        square = tokens[1:].T.reshape(1, -1, side, side)
        placed = square
        for convolution in self.convolutions:
            placed = placed + convolution(square)
        return torch.cat([tokens[:1].to(placed.dtype), placed.flatten(2).squeeze(0).T])


class NystromAttention(nn.Module):
    """Self-attention in time linear in the tokens: softmax(Q K~^T) pinv(softmax(Q~ K~^T)) softmax(Q~ K^T) V.

    Q~ and K~ are landmarks, means of equally many neighbours; zero tokens before the first make the number of tokens a
    multiple of the landmarks' and, as in the original, take part. Those landmarks that are means of zero tokens alone
    are equal: one stands for all of them, weighted by their number, so that a short bag costs what its tokens cost, and
    gets what it got. A depthwise convolution of V is added.

    Args:
        dim: width of the tokens.
        heads: heads, dim / heads wide each.
        landmarks: their number.
        dropout: the share of the result that is dropped in training.
    """

    def __init__(self, dim: int, heads: int, landmarks: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.landmarks = heads, landmarks
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.residual = nn.Conv2d(
            heads, heads, (RESIDUAL_KERNEL, 1), padding=(RESIDUAL_KERNEL // 2, 0), groups=heads, bias=False
        )
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [n, D] to the attention's result [n, D], and the first token's weights over the tokens, [n]."""
        share = -(-len(tokens) // self.landmarks)  # tokens a landmark
        missing = share * self.landmarks - len(tokens)
        equal = max(1, missing // share)  # landmarks that the first one stands for
        padding = missing - (equal - 1) * share
        tokens = F.pad(tokens, (0, 0, padding, 0))
        query, key, value = self.qkv(tokens).reshape(len(tokens), 3, self.heads, -1).permute(1, 2, 0, 3)  # [h, n, d]
        query = query * query.shape[-1] ** -0.5
        query_landmarks, key_landmarks = (part.unflatten(1, (-1, share)).mean(2) for part in (query, key))  # [h, m, d]
        to_landmarks = _weighted_softmax(query @ key_landmarks.mT, equal)  # [h, n, m]
        from_landmarks = _weighted_softmax(query_landmarks @ key.mT, missing - padding + 1)  # [h, m, n]
        inverse = self._inverse(query_landmarks, key_landmarks, equal).to(to_landmarks.dtype)
        mixed = (to_landmarks @ inverse) @ (from_landmarks @ value.to(from_landmarks.dtype))
        mixed = mixed + self.residual(value.unsqueeze(0)).squeeze(0)
        result = self.out(mixed.transpose(0, 1).flatten(1).to(tokens.dtype))
        with torch.no_grad():
            first = widened(to_landmarks[:, padding : padding + 1] @ inverse) @ widened(from_landmarks)
        return self.dropout(result[padding:]), first.mean(0)[0, padding:].clamp_min(0)

    def _inverse(self, query_landmarks: Tensor, key_landmarks: Tensor, equal: int) -> Tensor:
        """Equation 14: the pseudo-inverse by iteration, in float32 at least: its products leave half precision.

        Columns of equal landmarks are added up (their rows are alike): sums and products of such matrices are those of
        the whole ones so reduced.
        """
        with torch.autocast(query_landmarks.device.type, enabled=False):
            kernel = _weighted_softmax(widened(query_landmarks) @ widened(key_landmarks).mT, equal)
            transposed = kernel.mT
            if equal > 1:  # the whole matrix's transpose, reduced
                weights = kernel.new_ones(kernel.shape[-1])
                weights[0] = equal
                transposed = transposed * (weights / weights.unsqueeze(1))
            # Of all heads together, as in the original; in a bag of its own no other bag is among them.
            scale = kernel.sum(-1).max() * transposed.sum(-1).max()
            inverse, unit = transposed / scale, torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
            for _ in range(PINV_ITERATIONS):
                product = kernel @ inverse
                inner = 15 * unit - product @ (7 * unit - product)
                inverse = 0.25 * inverse @ (13 * unit - product @ inner)
        return inverse


def _weighted_softmax(logits: Tensor, weight: int) -> Tensor:
    """Over the last dimension, in whose sum the first entry stands for `weight` equal ones."""
    if weight > 1:
        logits = torch.cat([logits[..., :1] + math.log(weight), logits[..., 1:]], -1)
    return logits.softmax(-1)
