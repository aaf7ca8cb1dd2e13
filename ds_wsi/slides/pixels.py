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
    tile = np.ascontiguousarray(tile)
    factor, rest = divmod(tile.shape[0], side_px)
    if not rest and factor in EXACT_FACTORS:
        return average(tile, factor)
    # The box average is the physical answer when shrinking; enlarging interpolates.
    how = Image.Resampling.BOX if tile.shape[0] > side_px else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(tile).resize((side_px, side_px), how))


def average(pixels: np.ndarray, factor: int) -> np.ndarray:
    """The means of squares of pixels, to the bit those of Pillow's box filter, in half of its time or less.

    Pillow rounds twice, half up: the mean of each row of a square, and the mean of these.

    Args:
        pixels: uint8 [H, W, 3], contiguous, whose sides `factor` divides.
        factor: one of `EXACT_FACTORS`.

    Returns:
        uint8 [H / factor, W / factor, 3].
    """
    if factor != 2:
        return np.asarray(Image.fromarray(pixels).reduce((factor, 1)).reduce((1, factor)))
    height, width, _ = pixels.shape
    # Of every pixel and the next one, though half of them are dropped: a pass over the bytes as they lie is faster than
    # one by pixels of three.
    across = np.empty_like(pixels)
    flat = pixels.reshape(-1)
    _mean(flat[:-3], flat[3:], across.reshape(-1)[:-3])
    down = np.empty((height // 2, width, 3), dtype=np.uint8)
    _mean(across[0::2], across[1::2], down)
    every_other = np.ascontiguousarray(down.reshape(-1).view("V3")[::2])
    return every_other.view(np.uint8).reshape(height // 2, width // 2, 3)


def _mean(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    """(a + b + 1) // 2 without a wider type: a + b = 2 (a | b) - (a ^ b)."""
    np.right_shift(np.bitwise_xor(a, b, out=out), 1, out=out)
    np.subtract(np.bitwise_or(a, b), out, out=out)
