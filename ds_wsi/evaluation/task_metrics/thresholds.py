"""Thresholds that are fitted on predictions: where they come from goes with them."""

from dataclasses import dataclass

FITTED_ON = "validation"


@dataclass(frozen=True)
class Thresholds:
    """Thresholds on a model's outputs, kept with it.

    Attributes:
        values: a grade's are ascending, the labels' in the labels' order; NaN where none could be fitted.
        split: the split that they were fitted on.
        reasons: label -> why it has none.
    """

    values: tuple[float, ...]
    split: str
    reasons: tuple[tuple[str, str], ...] = ()


def check_fitted_on(split: str) -> None:
    """Refuse a split on which thresholds must not be fitted.

    Raises:
        ValueError: it is not the validation split.
    """
    if split != FITTED_ON:
        raise ValueError(
            f"thresholds must be fitted on the {FITTED_ON} split, got {split}. "
            "HINT: on the training split a model is too sure, on the test split its metrics would be too good."
        )
