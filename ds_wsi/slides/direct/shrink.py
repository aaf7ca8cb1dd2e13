"""A square tile from a square of the slide: how it is shrunk.

[Note: dct] A level at 1/2, 1/4 or 1/8 is its JPEG tiles decoded at that scale (see `jpeg_stream.decode`), side by side,
and white where the file has none. The scale is the coarsest that is not coarser than the tile; its square is the read
square divided by the scale, place and side each rounded half up to pixels of the shrunk level; the rest is averaged.
So the pixels depend on the file and the square alone. Where the read is less than twice as fine there is nothing to
decode smaller, and "dct" is "box". No other reader of slides decodes at a scale: what is not read directly is refused.
"""

import math

import numpy as np

from ds_wsi.slides.direct.errors import NotDirectError
from ds_wsi.slides.direct.jpeg_stream import SCALES
from ds_wsi.slides.direct.reader import DirectTiff
from ds_wsi.slides.pixels import resize
from ds_wsi.slides.policy import DCT


def decoded_scale(shrink: str, read_size_px: int, tile_size_px: int) -> int:
    """How many times a square is shrunk as its JPEG is decoded: 1, 2, 4 or 8; see [Note: dct]."""
    if shrink != DCT:
        return 1
    return max(scale for scale in SCALES if scale == 1 or read_size_px >= scale * tile_size_px)


def read_shrunk(
    slide: DirectTiff, x0: int, y0: int, level: int, read_size_px: int, scale: int, out: np.ndarray
) -> np.ndarray:
    """Read a square tile by "dct"; see [Note: dct].

    Args:
        slide: open.
        x0, y0: top left, level-0 px.
        level: the level to read from.
        read_size_px: the tile's side at that level.
        scale: what `decoded_scale` returns, 2 or more.
        out: uint8 [S, S, 3] to write to; it holds anything where an error is raised.

    Returns:
        `out`.

    Raises:
        NotDirectError: see `DirectTiff.read_shrunk`.
    """
    by = slide.levels[level].downsample * scale
    left, top = (math.floor(at / by + 0.5) for at in (x0, y0))
    side_px = math.floor(read_size_px / scale + 0.5)
    if side_px == out.shape[0]:
        return slide.read_shrunk(left, top, level, side_px, side_px, scale, out)
    np.copyto(out, resize(slide.read_shrunk(left, top, level, side_px, side_px, scale), out.shape[0]))
    return out


def read_tile(
    slide: DirectTiff,
    x0: int,
    y0: int,
    level: int,
    read_size_px: int,
    tile_size_px: int,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Read a square tile by "box": the means of its pixels, to the bit what `Slide.read_tile` makes of OpenSlide's.

    Args:
        slide: open.
        x0, y0: top left, level-0 px.
        level: the level to read from.
        read_size_px: the tile's side at that level.
        tile_size_px: the tile's side when returned.
        out: uint8 [tile_size_px, tile_size_px, 3] to write to; it holds anything where an error is raised.

    Returns:
        uint8 [tile_size_px, tile_size_px, 3].

    Raises:
        NotDirectError: see `DirectTiff.read_region`.
    """
    for scale in sorted(SCALES, reverse=True):
        is_whole = read_size_px == scale * tile_size_px
        # A mean of means would be rounded once more.
        if scale > 1 and not is_whole:
            continue
        whole = out if is_whole else None
        try:
            pixels = slide.read_region(x0, y0, level, read_size_px, read_size_px, scale, whole)
        except NotDirectError:
            if scale > 1:
                continue  # not at this scale; a broken tile is told by the last attempt
            raise
        if is_whole:
            return pixels
        resized = resize(pixels, tile_size_px)
        if out is None:
            return resized
        np.copyto(out, resized)
        return out
    raise AssertionError(SCALES)
