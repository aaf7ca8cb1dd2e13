"""A square tile from a square of the slide: how it is shrunk."""

import numpy as np

from ds_wsi.slides.direct.errors import NotDirectError
from ds_wsi.slides.direct.jpeg_page import BOX
from ds_wsi.slides.direct.jpeg_stream import SCALES
from ds_wsi.slides.direct.reader import DirectTiff
from ds_wsi.slides.pixels import resize


def read_tile(
    slide: DirectTiff,
    x0: int,
    y0: int,
    level: int,
    read_size_px: int,
    tile_size_px: int,
    shrink: str = BOX,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Read a square tile.

    Args:
        slide: open.
        x0, y0: top left, level-0 px.
        level: the level to read from.
        read_size_px: the tile's side at that level.
        tile_size_px: the tile's side when returned.
        shrink: "box", the mean of the pixels, to the bit what `Slide.read_tile` makes of OpenSlide's; or "dct", shrunk
            8, 4 or 2 times as it is decoded, as far as place and size allow, and averaged from there.
        out: uint8 [tile_size_px, tile_size_px, 3] to write to; it holds anything where an error is raised.

    Returns:
        uint8 [tile_size_px, tile_size_px, 3].

    Raises:
        NotDirectError: see `DirectTiff.read_region`.
    """
    for scale in sorted(SCALES, reverse=True):
        is_whole = read_size_px == scale * tile_size_px
        # A mean of means would be rounded once more.
        if scale > 1 and (
            read_size_px % scale or (not is_whole if shrink == BOX else read_size_px < scale * tile_size_px)
        ):
            continue
        whole = out if is_whole else None
        try:
            pixels = slide.read_region(x0, y0, level, read_size_px, read_size_px, scale, shrink, whole)
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
