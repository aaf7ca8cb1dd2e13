"""Where tissue is: a grey range and Otsu's threshold on saturation, both; and the fraction of each tile it covers."""

import numpy as np
from PIL import Image


def otsu_threshold(values: np.ndarray) -> int:
    """Otsu's threshold of uint8 values: foreground is what lies above it.

    Source: Otsu, "A threshold selection method from gray-level histograms", 1979, equation 18.
    """
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    below = counts.cumsum()
    sum_below = (counts * np.arange(256)).cumsum()
    total, mean_sum = below[-1], sum_below[-1]
    split = (below > 0) & (below < total)
    if not split.any():
        return int(values.flat[0]) if values.size else 0  # one value only: nothing lies above it
    between = np.zeros(256)
    between[split] = (mean_sum * below[split] - sum_below[split] * total) ** 2 / (below[split] * (total - below[split]))
    return int(between.argmax())


def grey_mask(rgb: np.ndarray, grey_range: tuple[int, int] = (3, 230)) -> np.ndarray:
    """Pixels neither black (missing data, ink) nor white (glass): bool [H, W] of uint8 [H, W, 3]."""
    grey = np.asarray(Image.fromarray(rgb).convert("L"))
    return (grey >= grey_range[0]) & (grey <= grey_range[1])


def saturation_mask(rgb: np.ndarray, threshold: int | None = None) -> np.ndarray:
    """Pixels whose HSV saturation (0 to 255) is above `threshold`, by default Otsu's of the image: bool [H, W]."""
    saturation = np.asarray(Image.fromarray(rgb).convert("HSV"))[..., 1]
    return saturation > (otsu_threshold(saturation) if threshold is None else threshold)


def tissue_mask(rgb: np.ndarray, grey_range: tuple[int, int] = (3, 230), use_saturation: bool = True) -> np.ndarray:
    """Tissue of an overview: in the grey range and, where asked, saturated. uint8 [H, W, 3] -> bool [H, W]."""
    mask = grey_mask(rgb, grey_range)
    return mask & saturation_mask(rgb) if use_saturation else mask


def tile_fractions(mask: np.ndarray, corners: np.ndarray, side: float) -> np.ndarray:
    """The fraction of each square that the mask covers, exact for corners and sides between pixels.

    Args:
        mask: bool [H, W].
        corners: float [N, 2], top left (x, y) in pixels of the mask.
        side: of the squares, in pixels of the mask; what lies outside the mask counts as not covered.

    Returns:
        float64 [N] in [0, 1].
    """
    integral = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    integral[1:, 1:] = mask.cumsum(0).cumsum(1)
    left, top = corners[:, 0], corners[:, 1]
    area = (
        _interpolate(integral, left + side, top + side)
        - _interpolate(integral, left, top + side)
        - _interpolate(integral, left + side, top)
        + _interpolate(integral, left, top)
    )
    return area / side**2


def _interpolate(integral: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Bilinear is exact: the integral of a piecewise constant function is bilinear within each cell.
    x, y = np.clip(x, 0, integral.shape[1] - 1), np.clip(y, 0, integral.shape[0] - 1)
    left, top = np.minimum(x.astype(int), integral.shape[1] - 2), np.minimum(y.astype(int), integral.shape[0] - 2)
    u, v = x - left, y - top
    upper = integral[top, left] * (1 - u) + integral[top, left + 1] * u
    lower = integral[top + 1, left] * (1 - u) + integral[top + 1, left + 1] * u
    return upper * (1 - v) + lower * v
