"""Aggregators whose instances see each other in a way that no segment operation expresses: one bag after another."""

import torch
from torch import Tensor, nn

from ds_wsi.models.output import SlideOutput
from ds_wsi.stacking.randomness import bag_draws
from ds_wsi.stacking.stacked_bags import StackedBags


class PerBagAggregator(nn.Module):
    """Base of aggregators that compute a bag at a time; random draws (dropout) come bag by bag, in order.

    Attributes:
        packed: bags of a stack are computed together.
    """

    packed = False

    def forward_bag(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, D] of one bag to logits [C] and attention [N]."""
        raise NotImplementedError

    def forward(self, bags: StackedBags) -> SlideOutput:
        """Pool features [sum N, D] to logits [B, C] and attention [sum N]."""
        outputs = []
        for bag, features in enumerate(bags.split()):
            with bag_draws(bag, features.device):
                outputs.append(self.forward_bag(features))
        return SlideOutput(
            torch.stack([logits for logits, _ in outputs]), torch.cat([attention for _, attention in outputs])
        )
