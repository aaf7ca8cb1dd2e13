"""The loss of a stack of bags."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_wsi.models.output import SlideOutput
from ds_wsi.runtime.numerics import widened
from ds_wsi.targets.sums import MISSING

IGNORED_LABEL = MISSING  # such a bag is in no sum and in no count


def stack_loss(output: SlideOutput, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over the bags of the cross-entropy of logits [B, C] and labels int64 [B], in float32 or float64.

    The aggregator's auxiliary loss, where it has one, is in the sum. A bag labelled `IGNORED_LABEL` is not.

    Args:
        output: the model's output for the stack.
        labels: int64 [B], one per bag.
        weights: [B], the factor w_b of each bag's loss; None: 1. They do not change what the sum is divided by.

    Raises:
        ValueError: one logit per bag, of which a cross-entropy over classes is zero whatever it is.
    """
    if output.logits.shape[1] < 2:
        raise ValueError(
            f"logits must be of two classes or more for a cross-entropy, got {list(output.logits.shape)}. HINT: "
            "num_classes=2; or F.binary_cross_entropy_with_logits(logits.squeeze(1), labels.float()) in a loop of "
            "your own."
        )
    losses = F.cross_entropy(widened(output.logits), labels, reduction="none", ignore_index=IGNORED_LABEL)
    if output.auxiliary_loss is not None:
        auxiliary = widened(output.auxiliary_loss)
        losses = losses + torch.where(labels == IGNORED_LABEL, torch.zeros_like(auxiliary), auxiliary)
    return losses.sum() if weights is None else losses @ weights.to(losses)
