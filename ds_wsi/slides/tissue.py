"""Where tissue is, by the rule that the policy names; and the fraction of each tile that it covers."""

import numpy as np
from PIL import Image, ImageFilter
from scipy.ndimage import label

BLACK = 20  # the largest channel of padding and missing data, JPEG's noise included
COLOURLESS = 6  # saturation that JPEG's noise gives grey pictures
MIN_GLASS = 0.01  # of the picture, to take its saturation
GLASS_SATURATION, STAINED = (8.0, 30.0), 20.0
NO_GLASS = 10.0
# Glass that is tinted or dim.
DIM_GLASS, SMOOTH, SAME_COLOUR, MAX_TINT, NEUTRAL, WHITE = 150, 4, 8, 45, 8, 245.0
MIN_TINTED, SMOOTH_SHARE = 0.05, 0.6
# Pens, as hue of 256: green to blue, below the violet of haematoxylin.
PEN_HUES, PEN_SATURATION, PEN_BLACK, PEN_BLACK_CHROMA, MAX_PEN = (60, 163), 110, 50, 16, 0.3
SPECK_MM2, LARGE_SHARE, PINHOLE_MM2 = 0.01, 0.99, 0.002


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


def tissue_mask(
    rgb: np.ndarray, rule: str, mpp: float, grey_range: tuple[int, int] = (3, 230), white: np.ndarray | None = None
) -> np.ndarray:
    """Tissue of an overview.

    Args:
        rgb: uint8 [H, W, 3].
        rule: one of `TISSUE_RULES`.
        mpp: resolution of the overview, um/px, for sizes.
        grey_range: grey values that can be tissue, both ends included.
        white: the picture as `white_glass` has it, where that is known.

    Returns:
        bool [H, W].
    """
    if rule == "none":
        return np.ones(rgb.shape[:2], dtype=bool)
    if rule == "auto":
        return auto_mask(white_glass(rgb, grey_range) if white is None else white, mpp, grey_range)
    mask = grey_mask(rgb, grey_range)
    return mask & saturation_mask(rgb) if rule == "otsu" else mask


def auto_mask(rgb: np.ndarray, mpp: float, grey_range: tuple[int, int] = (3, 230)) -> np.ndarray:
    """Tissue of a picture whose glass is white, by what its glass reaches: version 1 of the rule "auto".

    1. Glass that is tinted, or so dim that it is within the grey range, is found as a smooth, bright, pale colour; the
       picture is scaled so that it is white (`white_glass`, before this).
    2. Tissue is in the grey range, and above the smaller of Otsu's threshold on saturation and what glass reaches: the
       99th percentile of its saturation plus 3, at most 30, at least 8 and, of well stained slides, a quarter of the
       tissue's median up to 20 (edges are half glass); 10 where no glass is to be seen. Otsu's alone halves a picture
       that is all tissue. A picture without colours is judged by its grey values alone.
    3. Black padding and pen are no tissue. Colours of pens that cover much are the stain's.
    4. Specks are dropped where larger pieces hold nearly all, and pinholes are filled.

    Args and result: as of `tissue_mask`.
    """
    hsv = np.asarray(Image.fromarray(rgb).convert("HSV"))
    saturation = hsv[..., 1]
    in_range = grey_mask(rgb, grey_range) & (hsv[..., 2] >= BLACK)
    if not in_range.any():
        return in_range
    mask = in_range
    if np.percentile(saturation[in_range], 99) > COLOURLESS:
        mask = in_range & (
            saturation > min(otsu_threshold(saturation), _saturation_of_glass(rgb, saturation, in_range))
        )
    pen = mask & pen_mask(rgb, hsv)
    if pen.sum() <= MAX_PEN * mask.sum():
        mask = mask & ~pen
    return _without_specks(mask, mpp)


def white_glass(rgb: np.ndarray, grey_range: tuple[int, int]) -> np.ndarray:
    """The picture, uint8 [H, W, 3], with tinted or dim glass scaled to white, where there is such glass."""
    smooth = _smooth(rgb)
    colour = glass_colour(rgb, DIM_GLASS, grey_range[1], smooth)
    if colour is None:
        colour = glass_colour(rgb, grey_range[1] + 1, 255, smooth)
        if colour is None or np.ptp(colour) <= NEUTRAL:
            return rgb
    return np.clip(np.rint(rgb * (WHITE / colour)), 0, 255).astype(np.uint8)


def _smooth(rgb: np.ndarray) -> np.ndarray:
    """Pixels whose grey value is nearly that of their neighbours: bool [H, W]."""
    picture = Image.fromarray(rgb).convert("L")
    if min(picture.size) < 3:
        return np.zeros(rgb.shape[:2], dtype=bool)
    spread = np.asarray(picture.filter(ImageFilter.MaxFilter(3))).astype(np.int16)
    return spread - np.asarray(picture.filter(ImageFilter.MinFilter(3))) <= SMOOTH


def glass_colour(rgb: np.ndarray, low: int, high: int, smooth: np.ndarray) -> np.ndarray | None:
    """The colour of glass whose grey value is in [low, high]: float32 [3]; None where there is no such glass.

    Glass is smooth, bright and pale; and what has its colour is smooth nearly everywhere, which pale tissue is not.
    """
    grey = np.asarray(Image.fromarray(rgb).convert("L")).astype(np.int16)
    candidates = smooth & (grey >= low) & (grey <= high)
    if candidates.mean() < MIN_TINTED / 2:
        return None
    peak = int(np.convolve(np.bincount(grey[candidates], minlength=256), np.ones(5), "same").argmax())
    colour = np.median(rgb[candidates & (np.abs(grey - peak) <= SMOOTH)], axis=0).astype(np.float32)
    alike = (np.abs(rgb.astype(np.int16) - np.rint(colour).astype(np.int16)) <= SAME_COLOUR).all(-1)
    if np.ptp(colour) > MAX_TINT or alike.mean() < MIN_TINTED:
        return None
    return colour if smooth[alike].mean() >= SMOOTH_SHARE else None


def _saturation_of_glass(rgb: np.ndarray, saturation: np.ndarray, in_range: np.ndarray) -> float:
    """The saturation that glass, and what is half glass, stays below."""
    glass = ~in_range & (rgb.max(-1) >= BLACK)
    if glass.mean() < MIN_GLASS:
        return NO_GLASS
    low, high = GLASS_SATURATION
    at_least = min(max(low, float(np.median(saturation[in_range])) / 4), STAINED)
    return float(np.clip(np.percentile(saturation[glass], 99) + 3, at_least, high))


def pen_mask(rgb: np.ndarray, hsv: np.ndarray | None = None) -> np.ndarray:
    """Pixels in the colours of green, blue and black pens: bool [H, W] of uint8 [H, W, 3].

    Red pens are not told from blood, nor brown from pigment.
    """
    if hsv is None:
        hsv = np.asarray(Image.fromarray(rgb).convert("HSV"))
    hue, saturation, value = (hsv[..., channel] for channel in range(3))
    coloured = (hue >= PEN_HUES[0]) & (hue <= PEN_HUES[1]) & (saturation >= PEN_SATURATION)
    black = (value < PEN_BLACK) & (rgb.max(-1) - rgb.min(-1) < PEN_BLACK_CHROMA)
    return coloured | black


def _without_specks(mask: np.ndarray, mpp: float) -> np.ndarray:
    """The mask without small pieces, where the others hold nearly all of the tissue, and without small holes."""
    a_pixel = (mpp / 1000) ** 2  # mm2
    labels, count = label(mask)
    if count:
        areas = np.bincount(labels.ravel(), minlength=count + 1) * a_pixel
        areas[0] = 0
        large = areas >= SPECK_MM2
        if areas[large].sum() >= LARGE_SHARE * areas.sum():
            mask = large[labels]
    labels, count = label(~mask)
    areas = np.bincount(labels.ravel(), minlength=count + 1) * a_pixel
    small = areas < PINHOLE_MM2
    small[0] = False
    edges = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    small[edges] = False  # no hole: it goes on beyond the picture
    return mask | small[labels]


def tile_fractions(mask: np.ndarray, corners: np.ndarray, side: float) -> np.ndarray:
    """The fraction of each square that the mask covers, exact for corners and sides between pixels.

    Args:
        mask: bool [H, W].
        corners: float [N, 2], top left (x, y) in pixels of the mask.
        side: side of the squares, in pixels of the mask; what lies outside the mask counts as not covered.

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
