"""Several labels that do not exclude each other, each of which may be missing for a bag."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_wsi.runtime.numerics import widened
from ds_wsi.targets.sums import masked_sum


def multilabel_loss(
    logits: Tensor, targets: Tensor, pos_weight: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Sum of the binary cross-entropies of the pairs of bag and label that are known.

    Its units are `labelled_units(targets)`: a step's quotient is the mean over the known pairs.

    Args:
        logits: [B, L], of any floating type.
        targets: [B, L], 0 or 1, NaN where missing.
        pos_weight: [L], factors of the loss where the target is 1; None: 1. They do not change the units.
        weights: [B], factors of the bags' losses; None: 1.

    Raises:
        ValueError: targets of another shape.
    """
    if logits.shape != targets.shape:
        raise ValueError(
            f"targets must have the logits' shape, {list(logits.shape)}, got {list(targets.shape)}. HINT: one column "
            "per label, empty where it is missing."
        )
    z, present = widened(logits), ~targets.isnan()
    safe = torch.where(present, targets, 0.0).to(z.dtype)
    factors = None if pos_weight is None else pos_weight.to(z)
    losses = F.binary_cross_entropy_with_logits(z, safe, reduction="none", pos_weight=factors)
    return masked_sum(losses, present, weights)


def balanced_pos_weight(targets: Tensor, names: Sequence[str]) -> Tensor:
    """N- / N+ of each label in the TRAINING split: float64 [L], of its targets [n, L], NaN where missing.

    Args:
        targets: 0 or 1, NaN where missing.
        names: the labels', for the message only.

    Raises:
        ValueError: a label that no training bag has, or that all have; names them.
    """
    present = (targets == 1).sum(0)
    absent = (targets == 0).sum(0)
    constant = [name for name, n, m in zip(names, present.tolist(), absent.tolist(), strict=True) if not (n and m)]
    if constant:
        raise ValueError(
            "each label must be present in a training bag and absent from another for balanced weights, got one value "
            f"of {', '.join(constant)}. HINT: leave these labels out, or train without --pos_weight."
        )
    return absent.double() / present.double()
