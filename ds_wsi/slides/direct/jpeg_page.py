"""One image of a TIFF in JPEG tiles: what of it is in the file, and each tile's JPEG."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ds_wsi.slides.direct.errors import NotDirectError
from ds_wsi.slides.direct.jpeg_stream import RGB, YCBCR, before_scan, decode, stream_head
from ds_wsi.slides.direct.tiff_layout import Directory, SlideFile
from ds_wsi.slides.pixels import Workspace, average
from ds_wsi.slides.policy import BOX, DCT

SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 256, 257, 258, 259, 262
FILL_ORDER, DESCRIPTION, SAMPLES, PLANAR = 266, 270, 277, 284
TILE_WIDTH, TILE_HEIGHT, OFFSETS, BYTE_COUNTS, JPEG_TABLES = 322, 323, 324, 325, 347
IMAGE_DEPTH, TILE_DEPTH = 32997, 32998
JPEG = 7  # compression
REDUCED = 1  # bit of SUBFILE: an image of lower resolution of another
MAX_TILE_PIXELS = 2**24  # 48 MB decoded: a damaged size must not ask for more memory than there is
_workspace = Workspace()


@dataclass(frozen=True)
class JpegPage:
    """An image in JPEG tiles of three components of 8 bits, row by row.

    Attributes:
        number: the directory, counted from 0.
        width_px, height_px: the image's size.
        tile_width_px, tile_height_px: a tile's size; those of the last column and row reach beyond the image.
        head: what goes before a tile's own JPEG segments.
        offsets: int64 [rows * columns], the tiles' places in the file.
        byte_counts: int64 [rows * columns]; 0 where the file has no such tile.
    """

    number: int
    width_px: int
    height_px: int
    tile_width_px: int
    tile_height_px: int
    head: bytes
    offsets: np.ndarray
    byte_counts: np.ndarray

    @cached_property
    def _begins(self) -> list[tuple[bytes, bytes]]:
        """How the last tile began, and its file: tiles of one encoder begin alike, and are parsed once."""
        return [(b"", b"")]

    @cached_property
    def columns(self) -> int:
        """Tiles in a row."""
        return -(-self.width_px // self.tile_width_px)

    @cached_property
    def rows(self) -> int:
        """Tiles in a column."""
        return -(-self.height_px // self.tile_height_px)

    @classmethod
    def of(cls, directory: Directory) -> "JpegPage":
        """The page of a directory.

        Raises:
            NotDirectError: it is no such image; names what it is instead.
        """
        where = f"(directory {directory.number})"
        for tag, name, allowed in (
            (COMPRESSION, "compression", (JPEG,)),
            (PHOTOMETRIC, "photometric interpretation", (RGB, YCBCR)),
            (SAMPLES, "samples per pixel", (3,)),
            (PLANAR, "planar configuration", (1,)),
            (FILL_ORDER, "fill order", (1,)),
            (IMAGE_DEPTH, "image depth", (1,)),
            (TILE_DEPTH, "tile depth", (1,)),
        ):
            default = 1 if tag in (FILL_ORDER, PLANAR, IMAGE_DEPTH, TILE_DEPTH) else None
            value = directory.integer(tag, default)
            if value not in allowed:
                raise NotDirectError(f"{name} must be {' or '.join(map(str, allowed))}, got {value} {where}")
        if directory.integers(BITS).tolist() not in ([8], [8, 8, 8]):
            raise NotDirectError(f"samples must have 8 bits, got {directory.integers(BITS).tolist()[:4]} {where}")
        width, height, tile_width, tile_height = (
            directory.integer(tag) for tag in (WIDTH, HEIGHT, TILE_WIDTH, TILE_HEIGHT)
        )
        if min(width, height, tile_width, tile_height) < 1 or tile_width * tile_height > MAX_TILE_PIXELS:
            raise NotDirectError(
                f"tiles must have 1 to {MAX_TILE_PIXELS} px, got {tile_width} x {tile_height} of an image of "
                f"{width} x {height} {where}"
            )
        tables = directory.raw(JPEG_TABLES) if JPEG_TABLES in directory else None
        head = stream_head(directory.integer(PHOTOMETRIC), tables)
        offsets, byte_counts = directory.integers(OFFSETS), directory.integers(BYTE_COUNTS)
        page = cls(directory.number, width, height, tile_width, tile_height, head, offsets, byte_counts)
        n_tiles = page.rows * page.columns
        if (offsets.size, byte_counts.size) != (n_tiles, n_tiles):
            raise NotDirectError(
                f"directory must have the places of {n_tiles} tiles, got {offsets.size} and {byte_counts.size} {where}"
            )
        return page

    def jpeg(self, file: SlideFile, index: int) -> bytes | None:
        """The JPEG file of a tile, its pixels not decoded yet; None where the TIFF has no such tile.

        Raises:
            NotDirectError: the tile is broken.
        """
        n_bytes = int(self.byte_counts[index])
        if not n_bytes:
            return None
        stream = file.read(int(self.offsets[index]), n_bytes)
        begin, made = self._begins[0]  # at once: another thread may change it
        if not begin or not stream.startswith(begin):
            end, made = before_scan(self.head, stream, self.tile_width_px, self.tile_height_px)
            self._begins[0] = begin, made = stream[:end], made
        return made + stream[len(begin) :]

    def pixels(
        self, file: SlideFile, index: int, scale: int = 1, shrink: str = BOX, out: np.ndarray | None = None
    ) -> np.ndarray | None:
        """The decoded tile, uint8 [tile_height_px / scale, tile_width_px / scale, 3]; None as from `jpeg`.

        Args:
            file: the open file.
            index: the tile, row by row.
            scale: 1, 2, 4 or 8.
            shrink: BOX, the means of the decoded pixels; or DCT, see `jpeg_stream.decode`.
            out: uint8 of the returned size, contiguous, to write to.

        Raises:
            NotDirectError: the tile is broken.
        """
        jpeg = self.jpeg(file, index)
        if jpeg is None:
            return None
        size = self.tile_width_px, self.tile_height_px
        if scale == 1 or shrink == DCT:
            return decode(jpeg, *size, scale, out)
        whole = _workspace.array("whole", 3 * size[0] * size[1]).reshape(size[1], size[0], 3)
        return average(decode(jpeg, *size, out=whole), scale, out)


def is_tiled(directory: Directory) -> bool:
    """Whether an image is in tiles, of whatever compression."""
    return TILE_WIDTH in directory and TILE_HEIGHT in directory
