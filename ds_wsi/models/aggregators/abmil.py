"""Attention pooling over the instances of a bag.

Source: Ilse, Tomczak, Welling, "Attention-based Deep Multiple Instance Learning", ICML 2018, equations 7 to 9.

There h_k are of layers that are trained with the attention; for features of a frozen encoder `embed` has such layers.
"""

import re

from torch import Tensor, nn

from ds_wsi.models.aggregators.pooled import PooledAggregator


class ABMIL(PooledAggregator):
    """a_k = softmax_k(w^T tanh(V h_k)), z = sum_k a_k h_k, logits = W z (equations 7 and 8).

    Args:
        in_dim: width D of the features.
        num_classes: C.
        hidden_dim: width of the attention's hidden layer.
        dropout: the share of the pooled feature z that is dropped in training.
        embed: widths of layers before the attention, such as "256-128", each linear, ReLU and dropout: h_k is what
            leaves the last one; "" has none, and h_k are the features.
        embed_dropout: the share that each of these layers drops in training.
    """

    gated = False

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        hidden_dim: int = 128,
        dropout: float = 0.0,
        embed: str = "",
        embed_dropout: float = 0.25,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in layer_widths(embed):
            layers += [nn.Linear(in_dim, width), nn.ReLU(), nn.Dropout(embed_dropout)]
            in_dim = width
        self.embedding = nn.Sequential(*layers) if layers else None
        self.attention_v = nn.Linear(in_dim, hidden_dim)
        self.attention_u = nn.Linear(in_dim, hidden_dim) if self.gated else None
        self.attention_w = nn.Linear(hidden_dim, 1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(in_dim, num_classes)

    def embed(self, features: Tensor) -> Tensor:
        """Features [N, D] to h [N, D']."""
        return features if self.embedding is None else self.embedding(features)

    def scores(self, embedded: Tensor) -> Tensor:
        """Attention scores before the softmax: [N, 1]."""
        hidden = self.attention_v(embedded).tanh()
        if self.attention_u is not None:
            hidden = hidden * self.attention_u(embedded).sigmoid()  # Eq. 9
        return self.attention_w(hidden)

    def head(self, pooled: Tensor) -> Tensor:
        """Logits [B, C] of pooled bags [B, 1, D]."""
        return self.classifier(self.dropout(pooled.squeeze(1)))


def layer_widths(embed: str) -> list[int]:
    """The widths that `embed` of `ABMIL` names.

    Raises:
        ValueError: it names none.
    """
    if not re.fullmatch(r"([1-9]\d*(-[1-9]\d*)*)?", embed):
        raise ValueError(f"embed must be widths of layers such as 256 or 256-128, got {embed!r}")
    return [int(width) for width in embed.split("-") if width]


class GatedABMIL(ABMIL):
    """a_k = softmax_k(w^T (tanh(V h_k) * sigmoid(U h_k))) (equation 9)."""

    gated = True
