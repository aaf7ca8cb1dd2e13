"""Pooling without attention: the mean and the maximum of a bag's features."""

from torch import nn

from ds_wsi.models.output import SlideOutput
from ds_wsi.stacking.segment_ops import segment_max, segment_mean
from ds_wsi.stacking.stacked_bags import StackedBags


class MeanMIL(nn.Module):
    """Logits of the bag's mean feature."""

    pool = staticmethod(segment_mean)

    def __init__(self, in_dim: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(in_dim, num_classes)

    def forward(self, bags: StackedBags) -> SlideOutput:
        """Pool features [sum N, D] to logits [B, C]."""
        pooled = self.pool(bags.values, bags.cu_seqlens)
        return SlideOutput(self.classifier(self.dropout(pooled)), None)


class MaxMIL(MeanMIL):
    """Logits of the bag's largest value of each feature."""

    pool = staticmethod(segment_max)
