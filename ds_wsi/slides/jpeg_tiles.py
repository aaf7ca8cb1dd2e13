"""A TIFF's own JPEG tiles as files of their own: copied, not decoded."""

import numpy as np
import tifffile

from ds_wsi.slides.slide import Slide, TileReadError
from ds_wsi.slides.tiling import TileGrid

START, END = b"\xff\xd8", b"\xff\xd9"
RGB, YCBCR = 2, 6  # photometric interpretations
JPEG = 7  # compression
CHECKED_TILES = 8


class JpegTiles:
    """The JPEG tiles of the level that a grid is read from; made by `of`.

    Args:
        file: the open TIFF.
        page: the level's page.
        downsample: level-0 px per pixel of the level.
    """

    def __init__(self, file: tifffile.TiffFile, page: tifffile.TiffPage, downsample: float) -> None:
        self._file, self._page, self._downsample = file, page, downsample
        self._columns = -(-page.imagewidth // page.tilewidth)
        # A tile's stream leaves out its tables, and says nothing of its colours that decoders would agree on.
        transform = 1 if page.photometric == YCBCR else 0
        adobe = b"\xff\xee\x00\x0eAdobe\x00\x64" + bytes(4) + bytes([transform])
        tables = page.jpegtables or START + END
        self._head = START + adobe + tables[len(START) : -len(END)]

    @classmethod
    def of(cls, slide: Slide, grid: TileGrid) -> "JpegTiles | None":
        """The tiles to copy, or None where the grid's are none of the file's or do not decode to OpenSlide's pixels."""
        try:
            file = tifffile.TiffFile(slide.path)
        except (tifffile.TiffFileError, OSError):
            return None
        page = _page(file, slide, grid)
        if page is not None:
            tiles = cls(file, page, slide.level_downsamples[grid.level])
            if tiles._same_pixels(slide, grid):
                return tiles
        file.close()
        return None

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, x: int, y: int) -> bytes | None:
        """The JPEG of the tile at (x, y), level-0 px; None where it is not at a tile's corner, absent or broken."""
        position = [value / self._downsample / self._page.tilewidth for value in (x, y)]
        column, row = (round(value) for value in position)
        # A thousandth of a tile is below a pixel: downsamples of odd sizes are not whole numbers.
        if abs(column - position[0]) > 1e-3 or abs(row - position[1]) > 1e-3:
            return None
        index = row * self._columns + column
        n_bytes = self._page.databytecounts[index]
        if not n_bytes:
            return None
        self._file.filehandle.seek(self._page.dataoffsets[index])
        stream = self._file.filehandle.read(n_bytes)
        if not stream.startswith(START) or stream.rstrip(b"\x00")[-2:] != END:
            return None
        jpeg = self._head + stream[len(START) :]
        return jpeg if _decode(jpeg) is not None else None

    def _same_pixels(self, slide: Slide, grid: TileGrid) -> bool:
        """Whether some tiles, spread over the grid, decode to what OpenSlide reads; one at least must be there."""
        compared = 0
        for index in np.linspace(0, len(grid) - 1, min(CHECKED_TILES, len(grid))).astype(int):
            x, y = (int(value) for value in grid.coords[index])
            jpeg = self.read(x, y)
            if jpeg is None:
                continue
            try:
                expected = slide.read_tile(x, y, grid.level, grid.read_size_px, grid.tile_size_px)
            except TileReadError:
                continue
            decoded = _decode(jpeg)
            if decoded is None or not np.array_equal(decoded, expected):
                return False
            compared += 1
        return compared > 0


def _page(file: tifffile.TiffFile, slide: Slide, grid: TileGrid) -> tifffile.TiffPage | None:
    """The page of the grid's level, where its tiles are JPEG and of the grid's size."""
    if grid.read_size_px != grid.tile_size_px:
        return None
    for page in file.pages:
        size = (page.imagewidth, page.imagelength)
        if (
            size == slide.level_dimensions[grid.level]
            and page.is_tiled
            and (page.tilewidth, page.tilelength) == (grid.tile_size_px, grid.tile_size_px)
            and page.compression == JPEG
            and page.photometric in (RGB, YCBCR)
            and page.samplesperpixel == 3
            and page.bitspersample == 8
        ):
            return page
    return None


def _decode(jpeg: bytes) -> np.ndarray | None:
    import imagecodecs  # here, because it takes half a second that reading from slides does not need

    try:
        return np.asarray(imagecodecs.jpeg8_decode(jpeg))
    except RuntimeError:
        return None
