"""Real-valued targets: losses on the standardised target, and the way back to its own unit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_wsi.runtime.words import counted
from ds_wsi.targets.sums import masked_sum, single_output

# On the standardised target, so that Huber's corner, at 1, is a standard deviation away.
LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "huber": lambda outputs, targets: F.huber_loss(outputs, targets, reduction="none", delta=1.0),
    "mse": lambda outputs, targets: F.mse_loss(outputs, targets, reduction="none"),
    "mae": lambda outputs, targets: F.l1_loss(outputs, targets, reduction="none"),
}


@dataclass(frozen=True)
class Standardisation:
    """A target's scale in the TRAINING split: a model whose output is 0 predicts the mean.

    Attributes:
        mean, std: the training values', after the logarithm where it is taken; std over n.
        log1p: whether log(1 + value) is what is standardised.
    """

    mean: float
    std: float
    log1p: bool = False

    def apply(self, values: Tensor) -> Tensor:
        """Standardised values, float64, of values in the target's unit; NaN stays NaN.

        Raises:
            ValueError: a value that has no logarithm.
        """
        wide_values = values.double()
        return ((_logarithms(wide_values) if self.log1p else wide_values) - self.mean) / self.std

    def undo(self, outputs: Tensor) -> Tensor:
        """Values in the target's unit, float64, of a model's outputs."""
        values = outputs.detach().double() * self.std + self.mean
        return values.expm1() if self.log1p else values


def standardisation(values: Sequence[float] | Tensor, *, log1p: bool = False) -> Standardisation:
    """The scale of a target, of its values in the TRAINING split: others' would leak what is to be tested.

    Args:
        values: [n], NaN where missing.
        log1p: whether the model learns log(1 + value), of a skewed target.

    Raises:
        ValueError: no value, all values equal, or one that is not finite or has no logarithm.
    """
    given = torch.as_tensor(values, dtype=torch.float64)
    present = given[~given.isnan()]
    if len(present) == 0 or present.isinf().any():
        raise ValueError(
            "the training split's values must be finite, one at least, got "
            f"{counted(len(present), 'value')}, {int(present.isinf().sum())} of them infinite"
        )
    scaled = _logarithms(present) if log1p else present
    if scaled.min() == scaled.max():  # the deviation that is computed of equal values need not be 0
        raise ValueError(
            f"the training split's values must differ, got {present[0]:g} alone ({counted(len(present), 'value')}). "
            "HINT: take another column, or leave the target out."
        )
    return Standardisation(scaled.mean().item(), scaled.std(correction=0).item(), log1p)


def regression_loss(outputs: Tensor, targets: Tensor, kind: str = "huber", weights: Tensor | None = None) -> Tensor:
    """Sum over the labelled bags of the losses; its units are `labelled_units(targets)`.

    Args:
        outputs: [B] or [B, 1], of any floating type.
        targets: [B], standardised (`Standardisation.apply`); NaN: missing.
        kind: a key of `LOSSES`.
        weights: [B], factors of the bags' losses; None: 1.

    Raises:
        ValueError: unknown kind, or more than one output per bag.
    """
    if kind not in LOSSES:
        raise ValueError(f"loss of a regression must be one of {', '.join(LOSSES)}, got {kind!r}")
    predicted = single_output(outputs)
    if targets.shape != predicted.shape:
        raise ValueError(
            f"targets must be one per bag, [{len(predicted)}], got {list(targets.shape)}. HINT: each column is a "
            "target of its own."
        )
    present = ~targets.isnan()
    safe = torch.where(present, targets, 0.0).to(predicted.dtype)
    return masked_sum(LOSSES[kind](predicted, safe), present, weights)


def _logarithms(values: Tensor) -> Tensor:
    wrong = values[values <= -1]
    if len(wrong):
        raise ValueError(
            f"values must be greater than -1 for log1p, got {wrong[0]:g}. HINT: transform the column in the table."
        )
    return values.log1p()
