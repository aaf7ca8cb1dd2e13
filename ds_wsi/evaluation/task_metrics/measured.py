"""A metric's value with the reason where it has none, and the checks that all kinds of task share."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ds_wsi.evaluation.metrics import FloatArray, IntArray


@dataclass(frozen=True)
class Measured:
    """A metric of a set of slides.

    Attributes:
        value: NaN where the slides leave the metric undefined.
        reason: why it is undefined, or what was left out of it; "" where nothing was.
    """

    value: float
    reason: str = ""

    def __post_init__(self) -> None:
        assert self.reason or not math.isnan(self.value), "a metric that is undefined has a reason"


def with_reasons(values: Mapping[str, FloatArray], reasons: Mapping[str, str]) -> dict[str, Measured]:
    """Return the metrics of one row of weights, float64 [1] each, with the reasons of those that have one."""
    return {name: Measured(float(value[0]), reasons.get(name, "")) for name, value in values.items()}


def one_of_each(n_slides: int) -> IntArray:
    """Return the counts of the slides themselves: int64 [1, N]."""
    return np.ones((1, n_slides), dtype=np.int64)


def finite_column(
    name: str, values: npt.ArrayLike, n_slides: int | None = None, slide_ids: Sequence[str] | None = None
) -> FloatArray:
    """Return finite numbers, one per slide: float64 [N].

    Args:
        name: what they are, for messages.
        values: float or integer [N].
        n_slides: N; None takes as many as there are.
        slide_ids: N names, for messages.

    Raises:
        ValueError: another shape, no slide, a value that is not finite; the first such slide is named.
    """
    column = np.asarray(values, dtype=np.float64)
    check_length(name, column.shape, n_slides)
    wrong = np.flatnonzero(~np.isfinite(column))
    if wrong.size:
        raise ValueError(
            f"{name} must be finite, got {column[wrong[0]]} ({slide_name(int(wrong[0]), slide_ids)}). "
            "HINT: leave out slides without a target; a prediction that is NaN comes from a diverged model."
        )
    return column


def check_length(name: str, shape: tuple[int, ...], n_slides: int | None = None) -> None:
    """Refuse what has not one value per slide.

    Raises:
        ValueError: the shape is not [N], or [0].
    """
    if len(shape) != 1 or (n_slides is not None and shape[0] != n_slides):
        expected = "N" if n_slides is None else n_slides
        raise ValueError(f"{name} must have shape [{expected}], got {list(shape)}. HINT: give one value per slide.")
    if shape[0] == 0:
        raise ValueError(f"{name} must hold at least one slide, got 0. HINT: look whether the split is empty.")


def integer_column(
    name: str, values: npt.ArrayLike, limit: int, n_slides: int | None = None, slide_ids: Sequence[str] | None = None
) -> IntArray:
    """Return integers in [0, limit), one per slide: int64 [N].

    Raises:
        ValueError: another shape, no slide, another type, a value outside; the first such slide is named.
    """
    column = np.asarray(values)
    check_length(name, column.shape, n_slides)
    if not np.issubdtype(column.dtype, np.integer):
        raise ValueError(f"{name} must be integers, got {column.dtype}. HINT: give indices, not names.")
    wrong = np.flatnonzero((column < 0) | (column >= limit))
    if wrong.size:
        raise ValueError(
            f"{name} must lie in [0, {limit}), got {column[wrong[0]]} ({slide_name(int(wrong[0]), slide_ids)}). "
            "HINT: leave out slides without a target."
        )
    return column.astype(np.int64)


def slide_name(row: int, slide_ids: Sequence[str] | None) -> str:
    """Name a slide in a message, by its row where it has no other name."""
    return f"row {row}" if slide_ids is None else f"slide {slide_ids[row]}"


def listed(names: Iterable[str]) -> str:
    """Return names as they stand in a reason: a, b."""
    return ", ".join(names)
