"""The levels of a slide among a TIFF's images, and their tiles that are drawn from others, by OpenSlide's rules.

Source: openslide 4.0.1, src/openslide-vendor-aperio.c and openslide-vendor-generic-tiff.c (the rules, not the code).
"""

import itertools
from dataclasses import dataclass

import numpy as np

from ds_wsi.slides.direct.errors import NotDirectError
from ds_wsi.slides.direct.jpeg_page import DESCRIPTION, REDUCED, SUBFILE, JpegPage, is_tiled
from ds_wsi.slides.direct.tiff_layout import Directory

APERIO, GENERIC = "aperio", "generic-tiff"  # OpenSlide's vendors


@dataclass(frozen=True)
class Level:
    """A level of a slide.

    Attributes:
        page: the image.
        downsample: level-0 px per pixel.
        redrawn: bool [rows * columns], the tiles that OpenSlide draws from the level below, scaled.
    """

    page: JpegPage
    downsample: float
    redrawn: np.ndarray

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height, px."""
        return self.page.width_px, self.page.height_px


def find_levels(directories: list[Directory]) -> tuple[str, list[Level]]:
    """OpenSlide's vendor of the file, and the levels, the finest first.

    Raises:
        NotDirectError: a level is not in JPEG tiles that can be read directly.
    """
    first = directories[0]
    if not is_tiled(first):
        raise NotDirectError("the first image of the TIFF must be in tiles, got strips")
    is_aperio = DESCRIPTION in first and first.raw(DESCRIPTION).startswith(b"Aperio")
    pages = [JpegPage.of(directory) for directory in directories if _is_level(directory, is_aperio)]
    if not is_aperio:
        pages.sort(key=lambda page: -page.width_px)
    if any(later.width_px > page.width_px for page, later in itertools.pairwise(pages)):
        raise NotDirectError("levels must be ever smaller, got a larger one behind another")
    absent = [page.byte_counts == 0 for page in pages]
    redrawn = _redrawn(pages, absent) if is_aperio else [np.zeros_like(tiles) for tiles in absent]
    levels = [
        Level(page, 1.0 if index == 0 else _downsample(pages[0], page), tiles)
        for index, (page, tiles) in enumerate(zip(pages, redrawn, strict=True))
    ]
    return APERIO if is_aperio else GENERIC, levels


def _is_level(directory: Directory, is_aperio: bool) -> bool:
    if not is_tiled(directory):
        return False
    return is_aperio or directory.number == 0 or bool(directory.integer(SUBFILE, 0) & REDUCED)


def _downsample(base: JpegPage, page: JpegPage) -> float:
    return (base.height_px / page.height_px + base.width_px / page.width_px) / 2


def _redrawn(pages: list[JpegPage], absent: list[np.ndarray]) -> list[np.ndarray]:
    """An Aperio file's tiles that are absent, or above one that is, but for those of the finest level.

    Level 0 has nothing below: its absent tiles are transparent, as all of them are in a generic TIFF.
    """
    missing = absent[0]
    redrawn = [np.zeros_like(missing)]
    for below, page, absent_here in zip(pages, pages[1:], absent[1:], strict=False):
        # How many tiles of the level below lie under one of this level, rounded half up.
        across, down = (max(1, int(a / b + 0.5)) for a, b in ((below.columns, page.columns), (below.rows, page.rows)))
        rows, columns = np.divmod(missing.nonzero()[0], below.columns)
        above = rows // down * page.columns + columns // across
        missing = absent_here.copy()
        missing[above[above < missing.size]] = True
        redrawn.append(missing)
    return redrawn
