"""A TIFF's own JPEG tiles as files of their own: copied, not decoded."""

import numpy as np

from ds_wsi.slides.direct.errors import NotDirectError
from ds_wsi.slides.direct.jpeg_page import JpegPage, is_tiled
from ds_wsi.slides.direct.jpeg_stream import decode
from ds_wsi.slides.direct.proof import Region, difference
from ds_wsi.slides.direct.tiff_layout import SlideFile, read_directories
from ds_wsi.slides.slide import Slide, TileReadError
from ds_wsi.slides.tiling import TileGrid

CHECKED_TILES = 8


class JpegTiles:
    """The JPEG tiles of the level that a grid is read from; made by `of`.

    Args:
        file: the open TIFF.
        page: the level's page.
        downsample: level-0 px per pixel of the level.
    """

    def __init__(self, file: SlideFile, page: JpegPage, downsample: float) -> None:
        self._file, self._page, self._downsample = file, page, downsample

    @classmethod
    def of(cls, slide: Slide, grid: TileGrid) -> "JpegTiles | None":
        """The tiles to copy, or None where the grid's are none of the file's or do not decode to OpenSlide's pixels."""
        if grid.read_size_px != grid.tile_size_px:
            return None
        try:
            file = SlideFile(slide.path)
        except OSError:
            return None
        page = _page(file, slide, grid)
        if page is not None:
            tiles = cls(file, page, slide.level_downsamples[grid.level])
            # OpenSlide's own pixels: a slide that is read directly would be compared with itself.
            with Slide(slide.path, slide_id=slide.slide_id, reader="openslide") as by_openslide:
                if tiles._same_pixels(by_openslide, grid):
                    return tiles
        file.close()
        return None

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, x: int, y: int) -> bytes | None:
        """The JPEG of the tile at (x, y), level-0 px; None where it is not at a tile's corner, absent or broken."""
        page = self._page
        position = [value / self._downsample / page.tile_width_px for value in (x, y)]
        column, row = (round(value) for value in position)
        # A thousandth of a tile is below a pixel: downsamples of odd sizes are not whole numbers.
        if abs(column - position[0]) > 1e-3 or abs(row - position[1]) > 1e-3:
            return None
        if (column + 1) * page.tile_width_px > page.width_px or (row + 1) * page.tile_height_px > page.height_px:
            return None  # what a tile has beyond the image is not shown
        try:
            jpeg = page.jpeg(self._file, row * page.columns + column)
            if jpeg is not None:
                decode(jpeg, page.tile_width_px, page.tile_height_px)
        except NotDirectError:
            return None
        return jpeg

    def _same_pixels(self, slide: Slide, grid: TileGrid) -> bool:
        """Whether some tiles, spread over the grid, decode to what OpenSlide reads; one at least must be there."""
        size_px = grid.tile_size_px

        def copied(region: Region) -> np.ndarray | None:
            jpeg = self.read(region.x0, region.y0)
            return None if jpeg is None else decode(jpeg, size_px, size_px)

        def expected(region: Region) -> np.ndarray | None:
            try:
                return slide.read_tile(region.x0, region.y0, region.level, size_px, size_px)
            except TileReadError:
                return None

        rows = np.linspace(0, len(grid) - 1, min(CHECKED_TILES, len(grid))).astype(int)
        places = (grid.coords[row].tolist() for row in rows)
        regions = (Region(x, y, grid.level, size_px, size_px) for x, y in places)
        return difference(regions, copied, expected) is None


def _page(file: SlideFile, slide: Slide, grid: TileGrid) -> JpegPage | None:
    """The page of the grid's level, where its tiles are JPEG and of the grid's size."""
    try:
        directories = read_directories(file)
    except OSError:
        return None
    for directory in filter(is_tiled, directories):
        try:
            page = JpegPage.of(directory)
        except NotDirectError:
            continue
        is_level = (page.width_px, page.height_px) == slide.level_dimensions[grid.level]
        if is_level and (page.tile_width_px, page.tile_height_px) == (grid.tile_size_px, grid.tile_size_px):
            return page
    return None
