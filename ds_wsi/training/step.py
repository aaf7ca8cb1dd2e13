"""One micro-step: the stack's loss, weighted so that the engine's mean is the mean over the step's bags."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_wsi.models.output import SlideOutput
from ds_wsi.stacking.segment_ops import widened
from ds_wsi.stacking.stacked_bags import StackedBags, stack_bags


def bag_weight(bags_in_step: int, world_size: int, accumulation: int) -> float:
    """The factor on a bag's loss: engines take the mean over ranks and micro-steps, the step's is over its bags.

    With it the gradient is (1 / B) sum_b grad l_b over the step's B bags, however unevenly they lie on the ranks.
    """
    return world_size * accumulation / bags_in_step


def stack_loss(output: SlideOutput, labels: Tensor) -> Tensor:
    """Sum over the bags of the cross-entropy of logits [B, C] and labels int64 [B], in float32 or float64.

    The aggregator's auxiliary loss, where it has one, is in the sum.
    """
    loss = F.cross_entropy(widened(output.logits), labels, reduction="sum")
    return loss if output.auxiliary_loss is None else loss + widened(output.auxiliary_loss).sum()


def blank_tile(tile_size_px: int, device: torch.device) -> Tensor:
    """A white tile as a bag: uint8 [1, 3, S, S]."""
    return torch.full((1, 3, tile_size_px, tile_size_px), 255, dtype=torch.uint8, device=device)


def idle_loss(model: nn.Module, blank: Tensor) -> Tensor:
    """The zero loss of a rank without a bag: it takes part in every collective and changes nothing.

    One blank instance goes through in evaluation mode, so that no running statistic moves.

    Args:
        model: wrapped by the engine.
        blank: a bag of one instance, of what the model takes: `blank_tile`, or features [1, D].
    """
    training = model.training
    model.eval()
    # With a label, so that what the auxiliary loss alone trains takes part too.
    label = torch.zeros(1, dtype=torch.int64, device=blank.device)
    output: SlideOutput = model(StackedBags(*stack_bags([blank])), label)
    model.train(training)
    return stack_loss(output, label) * 0.0
