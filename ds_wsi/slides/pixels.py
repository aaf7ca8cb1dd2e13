"""Pixels as they were read: on the slide's background, and at a tile's size."""

from collections.abc import Mapping

import numpy as np
from PIL import Image

EXACT_FACTORS = (2, 4, 8, 16)  # whose reciprocals both of Pillow's ways to average have as whole numbers


def background_of(properties: Mapping[str, str]) -> np.ndarray:
    """The slide's background colour, float32 [3] in [0, 255]: white where the file names none."""
    colour = properties.get("openslide.background-color", "FFFFFF")
    return np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)], dtype=np.float32)


def opaque(region: Image.Image, background: np.ndarray) -> np.ndarray:
    """RGBA to uint8 RGB [h, w, 3] on the background's colour, float32 [3]."""
    if np.frombuffer(region.tobytes("raw", "A"), dtype=np.uint8).min() == 255:
        # Pillow's encoder drops the alpha on the way: several times faster than NumPy's copy of 3 bytes in 4.
        rgb = np.frombuffer(region.tobytes("raw", "RGB"), dtype=np.uint8)
        return rgb.reshape(region.height, region.width, 3)
    rgba = np.asarray(region)
    alpha = rgba[..., 3]
    weight = alpha[..., None].astype(np.float32) / 255
    return np.rint(rgba[..., :3] * weight + background * (1 - weight)).astype(np.uint8)


def resize(tile: np.ndarray, side_px: int) -> np.ndarray:
    """Resample uint8 [S, S, 3] to [side_px, side_px, 3]."""
    factor, rest = divmod(tile.shape[0], side_px)
    if not rest and factor in EXACT_FACTORS:
        # As the average below, rows after columns, rounded to the same bits, in half of the time.
        halved = Image.fromarray(np.ascontiguousarray(tile)).reduce((factor, 1)).reduce((1, factor))
        return np.asarray(halved)
    # The box average is the physical answer when shrinking; enlarging interpolates.
    how = Image.Resampling.BOX if tile.shape[0] > side_px else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(np.ascontiguousarray(tile)).resize((side_px, side_px), how))
