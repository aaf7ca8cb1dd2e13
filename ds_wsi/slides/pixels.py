"""Pixels as they were read: on the slide's background, and at a tile's size."""

import threading
from collections.abc import Mapping

import numpy as np
from PIL import Image

EXACT_FACTORS = (2, 4, 8, 16)  # whose reciprocals both of Pillow's ways to average have as whole numbers
MAX_KEPT_BYTES = 2**22  # of an array of a `Workspace`


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


class Workspace(threading.local):
    """Arrays that a thread writes to again and again: the system's first touch of new memory costs as much as decoding.

    Not to be returned: the next call writes over them.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def array(self, name: str, n_bytes: int) -> np.ndarray:
        """uint8 [n_bytes], with anything in it; large ones are made anew each time."""
        if n_bytes > MAX_KEPT_BYTES:
            return np.empty(n_bytes, dtype=np.uint8)
        if name not in self._arrays or self._arrays[name].size < n_bytes:
            self._arrays[name] = np.empty(n_bytes, dtype=np.uint8)
        return self._arrays[name][:n_bytes]


_workspace = Workspace()


def average(pixels: np.ndarray, factor: int, out: np.ndarray | None = None) -> np.ndarray:
    """The means of squares of pixels, to the bit those of Pillow's box filter, in a quarter of its time.

    Pillow rounds twice, half up: the mean of each row of a square, and the mean of these.

    Args:
        pixels: uint8 [H, W, 3], contiguous, whose sides `factor` divides.
        factor: one of `EXACT_FACTORS`.
        out: uint8 [H / factor, W / factor, 3] to write to, contiguous.

    Returns:
        uint8 [H / factor, W / factor, 3].
    """
    height, width, _ = pixels.shape
    if out is None:
        out = np.empty((height // factor, width // factor, 3), dtype=np.uint8)
    if factor != 2:
        np.copyto(out, np.asarray(Image.fromarray(pixels).reduce((factor, 1)).reduce((1, factor))))
        return out
    # Of every pixel and the next one, though half of them are dropped: a pass over the bytes as they lie is faster than
    # one by pixels of three.
    flat, spare = pixels.reshape(-1), _workspace.array("spare", pixels.size)
    across = _workspace.array("across", pixels.size)
    _mean(flat[:-3], flat[3:], across[:-3], spare[:-3])
    rows = across.reshape(height // 2, 2, width * 3)
    half = pixels.size // 2
    down = _workspace.array("down", half)
    _mean(rows[:, 0], rows[:, 1], down.reshape(height // 2, -1), spare[:half].reshape(height // 2, -1))
    to = out.reshape(-1)
    for channel in range(3):  # every other pixel; three passes by bytes are faster than one by triples of them
        to[channel::3] = down[channel::6]
    return out


def _mean(a: np.ndarray, b: np.ndarray, out: np.ndarray, spare: np.ndarray) -> None:
    """(a + b + 1) // 2 without a wider type: a + b = 2 (a | b) - (a ^ b); `spare` is written to."""
    np.right_shift(np.bitwise_xor(a, b, out=out), 1, out=out)
    np.subtract(np.bitwise_or(a, b, out=spare), out, out=out)
