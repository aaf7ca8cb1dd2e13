"""What several aggregators share: gated attention scores, and the weights that layers start from."""

from torch import Tensor, nn


class GatedAttention(nn.Module):
    """Scores e_km = w_m^T (tanh(V h_k) * sigmoid(U h_k)) of M branches that share V and U (Ilse et al., equation 9).

    Args:
        in_dim: width of h.
        hidden_dim: width of V h and U h.
        branches: M.
        dropout: the share of tanh(V h) and of sigmoid(U h) that is dropped in training.
    """

    def __init__(self, in_dim: int, hidden_dim: int, branches: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention_v = nn.Linear(in_dim, hidden_dim)
        self.attention_u = nn.Linear(in_dim, hidden_dim)
        self.attention_w = nn.Linear(hidden_dim, branches)
        self.dropout = nn.Dropout(dropout)

    def forward(self, embedded: Tensor) -> Tensor:
        """Scores [N, M] of instances [N, D']."""
        content = self.dropout(self.attention_v(embedded).tanh())
        return self.attention_w(content * self.dropout(self.attention_u(embedded).sigmoid()))


def xavier_linears(module: nn.Module) -> None:
    """Draw every linear layer's weights from Xavier's normal distribution and zero its bias, in place."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_normal_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
