"""Pooling without attention: the mean and the maximum of a bag's features."""

from torch import Tensor, nn

from ds_wsi.models.aggregators.pooled import PooledAggregator


class MeanMIL(PooledAggregator):
    """Logits of the bag's mean feature."""

    pooling = "mean"

    def __init__(self, in_dim: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(in_dim, num_classes)

    def head(self, pooled: Tensor) -> Tensor:
        """Logits [B, C] of pooled bags [B, 1, D]."""
        return self.classifier(self.dropout(pooled.squeeze(1)))


class MaxMIL(MeanMIL):
    """Logits of the bag's largest value of each feature."""

    pooling = "max"
