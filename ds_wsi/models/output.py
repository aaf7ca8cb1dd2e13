"""What an aggregator returns."""

from typing import NamedTuple

from torch import Tensor


class SlideOutput(NamedTuple):
    """Predictions of a stack of bags; a named tuple, so that the engines' hooks find its tensors.

    Attributes:
        logits: [B, C].
        attention: [sum N], each bag's weights summing to 1, or None where the aggregator has none.
    """

    logits: Tensor
    attention: Tensor | None
