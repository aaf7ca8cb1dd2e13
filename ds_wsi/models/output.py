"""What an aggregator returns."""

from typing import NamedTuple

from torch import Tensor


class SlideOutput(NamedTuple):
    """Predictions of a stack of bags; a named tuple, so that the engines' hooks find its tensors.

    Attributes:
        logits: [B, C].
        attention: [sum N], or [sum N, M] of M branches, each bag's weights summing to 1; None where the aggregator has
            none.
        auxiliary_loss: [B], what the aggregator adds to each bag's loss, weighted as in its original; None where it
            has none, and where it needs labels and got none.
        features: [sum N, D], what the aggregator was given; None but where a model `tells_features`.
    """

    logits: Tensor
    attention: Tensor | None
    auxiliary_loss: Tensor | None = None
    features: Tensor | None = None
