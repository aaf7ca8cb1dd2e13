"""A slide as a picture, block by block, also where parts of its file are broken."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ds_wsi.slides.readers import READ_ERRORS

GAP_PX = 64  # of level 0: an unreadable part of an overview is narrowed down to this
MAX_FAILED_READS = 500  # of an overview: after them, unreadable parts are no longer narrowed down


class ReadByBlocks(Protocol):
    """What an overview asks of the open slide; `slides.slide.Slide` is one, and imports this module."""

    @property
    def level_downsamples(self) -> Sequence[float]:
        """Level-0 px per pixel of each level."""

    def block(self, x: float, y: float, level: int, downsample: float, rows: int, columns: int) -> np.ndarray:
        """uint8 [rows, columns, 3] from (x, y) in level-0 px, read from `level` and shrunk to `downsample`."""

    def close(self) -> None:
        """Close the file; the next read opens it again."""


class OverviewReader:
    """Fills an overview block by block, and marks what cannot be read.

    Args:
        slide: the open slide.
        downsample: level-0 px per pixel of the overview.
        overview: uint8 [H, W, 3], written to.
        block_px: the side of a block in px of a level; up to twice as much is read.
    """

    def __init__(self, slide: ReadByBlocks, downsample: float, overview: np.ndarray, block_px: int) -> None:
        self.slide, self.downsample, self.overview, self.block_px = slide, downsample, overview, block_px
        self.unreadable = np.zeros(overview.shape[:2], dtype=bool)
        self.n_failed, self.reason = 0, ""

    def fill(self, top: int, left: int, rows: int, columns: int, level: int) -> None:
        """Read a block from a level, and where it is broken its quarters, and in the end those of finer levels."""
        block = slice(top, top + rows), slice(left, left + columns)
        side_px = max(rows, columns) * self.downsample / self.slide.level_downsamples[level]
        # Of a finer level a block may be large: it is divided before it is read.
        if side_px <= 2 * self.block_px:
            x, y = left * self.downsample, top * self.downsample
            try:
                self.overview[block] = self.slide.block(x, y, level, self.downsample, rows, columns)
                return
            except READ_ERRORS as error:
                self.slide.close()  # the handle is dead
                self.n_failed, self.reason = self.n_failed + 1, str(error)
            if self.n_failed > MAX_FAILED_READS:
                self.unreadable[block] = True
                return
        if side_px > GAP_PX and max(rows, columns) > 1:
            self._fill_quarters(top, left, rows, columns, level)
        elif level > 0:
            self.fill(top, left, rows, columns, level - 1)
        else:
            self.unreadable[block] = True

    def _fill_quarters(self, top: int, left: int, rows: int, columns: int, level: int) -> None:
        upper, first = max(1, rows // 2), max(1, columns // 2)
        for start, n_rows in ((0, upper), (upper, rows - upper)):
            for begin, n_columns in ((0, first), (first, columns - first)):
                if n_rows and n_columns:
                    self.fill(top + start, left + begin, n_rows, n_columns, level)
