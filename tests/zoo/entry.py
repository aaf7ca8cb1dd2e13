"""What the zoo knows of one model."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ZooModel:
    """A model of the zoo.

    Args:
        key: "library/family/name", unique.
        build: the module, with dropout and drop path where it is given True and the model has them; in float32.
        shape: a tile's, [3, H, W], or [3, T, H, W] of a video.
        image: the shape of a large image [3, H, W] for the spatial axis; None where the model is no convolutional one.
        keyword: the tiles' name in `forward`, where the library's users call it by keyword.
        floor: the error that is rounding in any case: 1e-9 in float64; 1e-6 where the model itself computes in float32,
            whose rounding chunks do not repeat.
    """

    key: str
    build: Callable[[bool], nn.Module]
    shape: tuple[int, ...]
    image: tuple[int, int, int] | None = None
    keyword: str | None = None
    floor: float = 1e-9
