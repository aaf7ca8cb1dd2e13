"""The loss of a stack of bags, and how far its features are from a teacher's."""

from collections.abc import Sequence

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


def distillation_losses(
    features: Tensor, teacher: Tensor, lengths: Sequence[int], totals: Sequence[int] | None = None, kind: str = "mse"
) -> Tensor:
    """What a stack's features cost for being others than a teacher's, of each bag: [B], float32 or float64.

    l_b = (1 / N_b) sum_k d(f_k, t_k) over the bag's tiles, d the mean over D of (f - t)^2, or 1 - cos(f, t). It is a
    sum over tiles: where ranks share a bag, each has its tiles' part of it by the whole bag's N_b.

    Args:
        features: [sum n, D], with their graph.
        teacher: [sum n, D], of the same tiles.
        lengths: n of each bag here.
        totals: N of each bag on all ranks that share it; by default `lengths`.
        kind: "mse" or "cosine".

    Source: Li and Hoiem, "Learning without Forgetting" (2016), on features, as Big-Layers' second paper has it.
    """
    here = widened(features)
    there = teacher.to(here)
    if kind == "cosine":
        each = 1 - F.cosine_similarity(here, there, dim=1)
    else:
        assert kind == "mse", kind
        each = (here - there).square().mean(1)
    sums = torch.stack([part.sum() for part in each.split(list(lengths))])
    return sums / torch.tensor(list(totals or lengths), device=sums.device, dtype=sums.dtype)
