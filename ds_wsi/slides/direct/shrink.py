"""A square tile from a square of the slide: how it is shrunk."""

import numpy as np

from ds_wsi.slides.direct.errors import NotDirectError
from ds_wsi.slides.direct.jpeg_stream import SCALES
from ds_wsi.slides.direct.reader import DirectTiff
from ds_wsi.slides.pixels import resize


def read_box(slide: DirectTiff, x0: int, y0: int, level: int, read_size_px: int, tile_size_px: int) -> np.ndarray:
    """Read a square at full resolution and average its pixels: what `Slide.read_tile` makes of OpenSlide's.

    Args:
        slide: open.
        x0, y0: top left, level-0 px.
        level: the level to read from.
        read_size_px: the square's side at that level.
        tile_size_px: the side of what is returned.

    Returns:
        uint8 [tile_size_px, tile_size_px, 3].

    Raises:
        NotDirectError: see `DirectTiff.read_region`.
    """
    pixels = slide.read_region(x0, y0, level, read_size_px, read_size_px)
    return pixels if read_size_px == tile_size_px else resize(pixels, tile_size_px)


def read_dct(slide: DirectTiff, x0: int, y0: int, level: int, read_size_px: int, tile_size_px: int) -> np.ndarray:
    """Read a square, shrunk 8, 4 or 2 times as it is decoded, as far as that is possible, and by averaging from there.

    Arguments, value and errors are those of `read_box`, which reads the square where no such shrinking is possible.
    """
    for scale in sorted(SCALES[1:], reverse=True):
        if read_size_px % scale or read_size_px < scale * tile_size_px:
            continue
        try:
            pixels = slide.read_region(x0, y0, level, read_size_px, read_size_px, scale)
        except NotDirectError:
            continue  # not at this scale; a broken tile is told by the last attempt
        return pixels if read_size_px == scale * tile_size_px else resize(pixels, tile_size_px)
    return read_box(slide, x0, y0, level, read_size_px, tile_size_px)
