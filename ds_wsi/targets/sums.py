"""Sums over the labelled bags of a stack: what every separable loss here ends in.

A separable loss is a sum of one term per labelled bag. Each of them here is such a sum over a stack, never a mean: what
it is divided by belongs to the whole step and comes from outside, see `targets.denominators`.
"""

import torch
from torch import Tensor

from ds_wsi.runtime.numerics import widened

MISSING = -100  # a class or a bin that is not known: torch's and the HF Trainer's number; of real targets it is NaN


def single_output(outputs: Tensor) -> Tensor:
    """One number per bag, [B], of outputs [B] or [B, 1], in the type in which losses are computed.

    A loss of [B, 1] against targets [B] would be one of [B, B].

    Raises:
        ValueError: the model has more outputs, or none.
    """
    if outputs.dim() not in (1, 2) or outputs.shape[1:].numel() != 1:
        raise ValueError(
            f"outputs must be one per bag, [B] or [B, 1], got {list(outputs.shape)}. HINT: build the head with "
            "num_outputs 1, or take the target's own column."
        )
    return widened(outputs).reshape(-1)


def masked_sum(losses: Tensor, present: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum of the losses that are present; without any it is a zero that stays connected to the graph.

    Args:
        losses: [B, ...], finite also where they are not present: a NaN there would reach the gradient.
        present: bool, of the same shape.
        weights: [B], factors of the bags' losses; None: 1. They do not change what the sum is divided by.
    """
    kept = torch.where(present, losses, torch.zeros_like(losses))
    if weights is not None:
        kept = kept * weights.to(losses).reshape(-1, *[1] * (losses.dim() - 1))
    return kept.sum()


def connected_zero(outputs: Tensor) -> Tensor:
    """Zero, with outputs [B, ...] in its graph: a backward that takes part in every collective and changes nothing.

    Not 0 x outputs: that is NaN where an output is not finite.
    """
    return widened(outputs)[:0].sum()
