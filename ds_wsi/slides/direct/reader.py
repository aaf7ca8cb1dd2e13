"""A slide of the TIFF family with JPEG tiles, read without OpenSlide, with OpenSlide's pixels."""

import itertools
import os
from typing import NamedTuple

import numpy as np

from ds_wsi.slides.direct.errors import NotDirectError
from ds_wsi.slides.direct.jpeg_page import JpegPage
from ds_wsi.slides.direct.jpeg_stream import SCALES
from ds_wsi.slides.direct.levels import find_levels
from ds_wsi.slides.direct.tiff_layout import SlideFile, read_directories
from ds_wsi.slides.direct.tile_cache import TileCache, Window
from ds_wsi.slides.pixels import Workspace
from ds_wsi.slides.policy import BOX, DCT

BACKGROUND = 255  # of all three channels: OpenSlide names no other colour for these formats
PIECE_PX = 4096  # OpenSlide reads a larger region in pieces, each from a whole level-0 pixel of its own
# Cairo, which draws for OpenSlide, takes a place for the whole pixel that is nearer to it than half of Cairo's unit of
# 1/256 px; a little less is safe.
WHOLE_PIXEL = 1 / 600

_numbers = itertools.count()
_workspace = Workspace()


class _Start(NamedTuple):
    """Where a region begins along one axis.

    Attributes:
        skipped_px: pixels of the region before the level's first.
        first_px: the level's pixel that comes next.
    """

    skipped_px: int
    first_px: int

    @classmethod
    def of(cls, place: int, downsample: float) -> "_Start":
        """The start at a level-0 pixel.

        Raises:
            NotDirectError: it lies between pixels of the level, where OpenSlide interpolates.
        """
        if place < 0:
            return cls(int(-place / downsample), 0)  # OpenSlide rounds it so
        position = place / downsample
        if abs(position - round(position)) > WHOLE_PIXEL:
            raise NotDirectError(f"region must begin on a pixel of its level, got {position:g}")
        return cls(0, round(position))


class DirectTiff:
    """An open slide; what it does not read it says, and OpenSlide is to be asked for that.

    Reads from any thread, and on both sides of a fork. Whether its pixels are OpenSlide's is for `prove` to say.

    Args:
        path: the slide's file.
        cache: where decoded tiles are kept; one of its own by default.

    Attributes:
        file: the open file.
        vendor: the format, by OpenSlide's name.
        levels: the images, the finest first.

    Raises:
        NotDirectError: no TIFF whose levels are all in JPEG tiles; the message is the reason.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], cache: TileCache | None = None) -> None:
        self.file = SlideFile(path)
        try:
            self.vendor, self.levels = find_levels(read_directories(self.file))
        except BaseException:
            self.file.close()
            raise
        self._cache = TileCache() if cache is None else cache
        self._number = next(_numbers)  # of this slide in the cache

    def __enter__(self) -> "DirectTiff":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let its tiles go; a later read raises NotDirectError."""
        self.file.close()
        self._cache.drop(self._number)

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height of level 0, px."""
        return self.levels[0].dimensions

    @property
    def level_dimensions(self) -> tuple[tuple[int, int], ...]:
        """Width and height of each level, px."""
        return tuple(level.dimensions for level in self.levels)

    @property
    def level_downsamples(self) -> tuple[float, ...]:
        """Level-0 px per pixel of each level."""
        return tuple(level.downsample for level in self.levels)

    def read_region(
        self,
        x0: int,
        y0: int,
        level: int,
        width_px: int,
        height_px: int,
        scale: int = 1,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """The pixels of a rectangle, white where the slide has none.

        Args:
            x0, y0: top left, level-0 px; may lie outside.
            level: the level to read from.
            width_px, height_px: size at that level.
            scale: 1, or 2, 4 or 8: the rectangle is shrunk so many times, to the means of its pixels, tile by tile.
            out: uint8 of the returned size, to write to; it holds anything where an error is raised.

        Returns:
            uint8 [height_px / scale, width_px / scale, 3].

        Raises:
            NotDirectError: a tile is broken, or drawn by OpenSlide from another level, or the rectangle does not begin
                on a pixel of the level; at a scale also where it begins on none of the shrunk level, or ends outside.
        """
        if not 0 <= level < len(self.levels):
            raise ValueError(f"level must be in [0, {len(self.levels)}), got {level}")
        if min(width_px, height_px) < 1:
            raise ValueError(f"region must have at least 1 px, got {width_px} x {height_px}")
        if scale not in SCALES or width_px % scale or height_px % scale:
            raise ValueError(f"scale must be 1, 2, 4 or 8 and divide the region, got {scale}")
        downsample = self.levels[level].downsample
        if out is None:
            out = np.empty((height_px // scale, width_px // scale, 3), dtype=np.uint8)
        for top, left in itertools.product(range(0, height_px, PIECE_PX), range(0, width_px, PIECE_PX)):
            x = _Start.of(int(x0 + left * downsample), downsample)  # truncated as OpenSlide does
            y = _Start.of(int(y0 + top * downsample), downsample)
            piece = out[top // scale : (top + PIECE_PX) // scale, left // scale : (left + PIECE_PX) // scale]
            if scale > 1:
                _require_shrinkable(self.levels[level].page, piece, x, y, scale)
            self._fill(piece, x, y, level, scale, BOX)
        return out

    def read_shrunk(
        self, left: int, top: int, level: int, width_px: int, height_px: int, scale: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """The pixels of a rectangle of a level as it is where its tiles are decoded at half their size or less.

        Args:
            left, top: top left, px of the shrunk level; may lie outside.
            level: the level to read from.
            width_px, height_px: size, px of the shrunk level.
            scale: 2, 4 or 8: how many times the level is shrunk.
            out: uint8 [height_px, width_px, 3] to write to; it holds anything where an error is raised.

        Returns:
            uint8 [height_px, width_px, 3], white where the slide has no pixel.

        Raises:
            NotDirectError: a tile is broken, drawn by OpenSlide from another level, or of a side that `scale` does not
                divide.
        """
        page = self.levels[level].page
        if page.tile_width_px % scale or page.tile_height_px % scale:
            size = f"{page.tile_width_px} x {page.tile_height_px}"
            raise NotDirectError(f"tiles of level {level} must have sides of multiples of {scale} px, got {size}")
        if out is None:
            out = np.empty((height_px, width_px, 3), dtype=np.uint8)
        x, y = (_Start(max(0, -at), max(0, at) * scale) for at in (left, top))
        self._fill(out, x, y, level, scale, DCT)
        return out

    def _fill(self, piece: np.ndarray, x: _Start, y: _Start, level: int, scale: int, shrink: str) -> None:
        """Draw the tiles that a piece of a region shows, uint8 [h, w, 3], and the background where there is none."""
        page = self.levels[level].page
        whole, piece = piece, piece[y.skipped_px :, x.skipped_px :]
        left, top = x.first_px // scale, y.first_px // scale
        # A pixel of a shrunk level that begins in the slide is the slide's.
        width, height = (-(-side // scale) for side in (page.width_px, page.height_px))
        right, bottom = min(left + piece.shape[1], width), min(top + piece.shape[0], height)
        if (bottom - top, right - left) != whole.shape[:2]:
            whole[:] = BACKGROUND
        if left >= right or top >= bottom:
            return
        tile_width, tile_height = page.tile_width_px // scale, page.tile_height_px // scale
        for row in range(top // tile_height, -(-bottom // tile_height)):
            for column in range(left // tile_width, -(-right // tile_width)):
                tile_left, tile_top = column * tile_width, row * tile_height
                x0, x1 = max(left, tile_left), min(right, tile_left + tile_width)
                y0, y1 = max(top, tile_top), min(bottom, tile_top + tile_height)
                target = piece[y0 - top : y1 - top, x0 - left : x1 - left]
                window = slice(y0 - tile_top, y1 - tile_top), slice(x0 - tile_left, x1 - tile_left)
                self._show((level, row, column), window, scale, shrink, target)

    def _show(self, at: tuple[int, int, int], window: Window, scale: int, shrink: str, target: np.ndarray) -> None:
        """Draw a part of a tile, kept or read now, at (level, row, column)."""
        level, row, column = at
        source = self.levels[level]
        page, index = source.page, row * source.page.columns + column
        if source.redrawn[index]:
            raise NotDirectError(f"tile ({column}, {row}) of level {level} must be in the file, got none of its own")
        key = (self._number, level, index, scale, shrink)
        if self._cache.show(key, window, target):
            return
        shape = (page.tile_height_px // scale, page.tile_width_px // scale, 3)
        # What is shown as a whole is not read again soon; where it can be decoded in place it needs no copy.
        is_shown_whole = target.shape == shape
        if is_shown_whole:
            tile = target if target.flags.c_contiguous else _workspace.array("tile", target.size).reshape(shape)
        else:
            tile = self._cache.room(shape)
        try:
            pixels = page.pixels(self.file, index, scale, shrink, tile)
        except NotDirectError as error:
            raise NotDirectError(f"tile ({column}, {row}) of level {level} must be readable: {error}") from error
        if pixels is None:
            target[:] = BACKGROUND
            return
        if pixels is not tile:
            tile[:] = pixels
        if tile is not target:
            target[:] = tile[window]
        if not is_shown_whole:
            self._cache.put(key, tile)


def _require_shrinkable(page: JpegPage, piece: np.ndarray, x: _Start, y: _Start, scale: int) -> None:
    height_px, width_px = piece.shape[0] * scale, piece.shape[1] * scale
    is_inside = (
        not (x.skipped_px or y.skipped_px)
        and x.first_px + width_px <= page.width_px
        and y.first_px + height_px <= page.height_px
    )
    steps = (x.first_px, y.first_px, page.tile_width_px, page.tile_height_px)
    if not is_inside or any(step % scale for step in steps):
        raise NotDirectError(f"region must lie in the level, and begin and have tiles of multiples of {scale} px")
