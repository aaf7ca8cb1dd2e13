"""A slide file: its geometry, its resolution, its tiles."""

import math
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ds_wsi.runtime.log import logger
from ds_wsi.slides.direct.shrink import decoded_scale
from ds_wsi.slides.direct.tile_cache import TileCache
from ds_wsi.slides.errors import SlideError, TileReadError
from ds_wsi.slides.overview import OverviewReader
from ds_wsi.slides.pixel_source import PixelSource
from ds_wsi.slides.pixels import background_of
from ds_wsi.slides.plain import RESOLUTION_SOURCE
from ds_wsi.slides.policy import AUTO, BOX, POSSIBLE_MPP
from ds_wsi.slides.readers import READ_ERRORS
from ds_wsi.slides.resolution import (
    CM_IN_UM,
    FALLBACK,
    INCH_IN_UM,
    MPP_HINT,
    OVERRIDE,
    PLAUSIBLE_MPP,
    mpp_problem,
    positive_number,
)

__all__ = ["Slide", "SlideCache", "SlideError", "TileReadError"]

OVERVIEW_BLOCK_PX = 2048  # of the level read at a time: bounds the memory of an overview
SHRINK_HINT = (
    "without --slide_reader openslide it may be; else convert it, as `vips tiffsave IN OUT.tif --tile --pyramid "
    "--compression jpeg` does, or train on tiles of `--shrink box`; --skip_bad_slides leaves it out."
)


class Overview(NamedTuple):
    """A slide as a picture.

    Attributes:
        pixels: uint8 [H, W, 3].
        downsample: level-0 px per pixel.
        unreadable: bool [H, W], the pixels of which the file could not be read, which are in the background's colour.
    """

    pixels: np.ndarray
    downsample: float
    unreadable: np.ndarray


class Slide:
    """An open slide.

    Pickles as one that is opened anew when it is read, and a forked process opens it anew.

    Args:
        path: the slide's file.
        mpp: um/px at level 0, which goes before the file's own.
        slide_id: names the slide in messages; by default the file's stem.
        cache_bytes: decoded data that OpenSlide keeps for this slide; without `tiles`, also what is read directly.
        fallback_mpp: um/px at level 0 where the file tells none that can be used.
        reader: "auto" reads JPEG tiles directly where that is proved to give OpenSlide's pixels, "openslide" none.
        tiles: where tiles that are read directly are kept, with those of other slides; None: in a cache of its own.

    Raises:
        SlideError: no file, no slide, or a slide that cannot be opened.
    """

    def __init__(
        self,
        path: str | Path,
        mpp: float | None = None,
        slide_id: str | None = None,
        cache_bytes: int = 2**25,
        fallback_mpp: float | None = None,
        reader: str = AUTO,
        tiles: TileCache | None = None,
    ) -> None:
        self.path = Path(path)
        self.slide_id = slide_id or self.path.stem
        self._mpp, self._fallback_mpp = mpp, fallback_mpp
        self._cache_bytes, self._reader, self._tiles = cache_bytes, reader, tiles
        self._handle: PixelSource | None = None
        self.level_dimensions: tuple[tuple[int, int], ...] = ()
        facts = self._open().facts
        self.width_px, self.height_px = facts.dimensions
        self.level_dimensions = facts.level_dimensions
        self.level_downsamples: tuple[float, ...] = facts.level_downsamples
        self._properties = facts.properties
        self._background = background_of(self._properties)

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handle": None}

    def _open(self) -> PixelSource:
        """The open file, opened anew where it was closed, written to, or opened by the process that forked this one.

        Raises:
            SlideError: it cannot be opened, or is another slide by now.
        """
        if self._handle is not None and self._handle.is_stale():
            self.close()
        if self._handle is None:
            tiles = TileCache(self._cache_bytes) if self._tiles is None else self._tiles
            handle = PixelSource(self.path, self.slide_id, self._reader, self._cache_bytes, tiles)
            dimensions = handle.facts.level_dimensions
            if self.level_dimensions not in ((), dimensions):
                handle.close()
                raise SlideError(
                    f"slide must stay as it was when it was opened, with levels of {self.level_dimensions} px, got "
                    f"{dimensions} (slide {self.slide_id}, {self.path}). HINT: do not change files under a run."
                )
            self._handle = handle
        return self._handle

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """The scanned area (x, y, width, height), level-0 px; the whole slide where the file names none."""
        names = ("x", "y", "width", "height")
        values = [self._properties.get(f"openslide.bounds-{name}") for name in names]
        if any(value is None for value in values):
            return 0, 0, self.width_px, self.height_px
        x, y, width, height = (int(str(value)) for value in values)
        return x, y, width, height

    @property
    def mpp(self) -> float:
        """Resolution of level 0, um/px: the override's, else the file's own, else the fallback's.

        Raises:
            SlideError: there is none, or it is implausible, or the file's pixels are no squares.
        """
        value, source, problem = self._found_mpp()
        if problem:
            raise SlideError(f"{problem} (slide {self.slide_id}, {self.path}). {MPP_HINT}")
        assert value is not None, source
        return value

    @property
    def mpp_source(self) -> str:
        """Where the resolution comes from."""
        return self._found_mpp()[1]

    @property
    def uses_fallback_mpp(self) -> bool:
        """Whether the file tells no resolution that can be used, and the fallback serves."""
        return self.mpp_source == FALLBACK

    def _found_mpp(self) -> tuple[float | None, str, str]:
        """The value, its source, and what is wrong with it, or an empty string."""
        if self._mpp is not None:
            return self._mpp, OVERRIDE, mpp_problem(self._mpp, self._mpp, OVERRIDE, POSSIBLE_MPP)
        x, y, source = self._told_mpp()
        problem = "slide must tell its resolution, got no mpp"
        if x is not None and y is not None:
            problem = mpp_problem(x, y, source, PLAUSIBLE_MPP)
            if not problem:
                return (x + y) / 2, source, ""
        given = self._fallback_mpp
        if given is not None:
            return given, FALLBACK, mpp_problem(given, given, FALLBACK, POSSIBLE_MPP)
        return x, source, problem

    def _told_mpp(self) -> tuple[float | None, float | None, str]:
        """What the file tells along x and y, and where."""
        x, y = (positive_number(self._properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
        if x and y:
            return x, y, "openslide.mpp-x and -y"
        unit = {"centimeter": CM_IN_UM, "inch": INCH_IN_UM}.get(self._properties.get("tiff.ResolutionUnit", ""))
        a_unit = positive_number(self._properties.get("tiff.XResolution"))
        if unit and a_unit:
            along_y = positive_number(self._properties.get("tiff.YResolution")) or a_unit
            return unit / a_unit, unit / along_y, self._properties.get(RESOLUTION_SOURCE, "the TIFF resolution tags")
        return None, None, "nothing"

    def require_shrink(self, shrink: str, level: int, read_size_px: int, tile_size_px: int) -> None:
        """Refuse a slide whose tiles cannot be shrunk as they are wanted; `read_tile` has the arguments.

        Raises:
            SlideError: "dct" is wanted, and the level is not read directly; names the reason.
        """
        if decoded_scale(shrink, read_size_px, tile_size_px) == 1:
            return
        try:
            reason = self._open().why_not_shrunk(level)
        except READ_ERRORS as error:
            self.close()  # the handle is dead
            reason = str(error)
        if reason:
            raise SlideError(
                f"slide must be in JPEG tiles that are read directly to be shrunk by dct, got: {reason} (slide "
                f"{self.slide_id}, {self.path}). HINT: {SHRINK_HINT}"
            )

    def read_tile(
        self,
        x: int,
        y: int,
        level: int,
        read_size_px: int,
        tile_size_px: int,
        out: np.ndarray | None = None,
        shrink: str = BOX,
    ) -> np.ndarray:
        """Read a square tile.

        Args:
            x, y: top left of the tile, level-0 px.
            level: the level to read from.
            read_size_px: the tile's side at that level.
            tile_size_px: the tile's side when returned; resampled where the two differ.
            out: uint8 [tile_size_px, tile_size_px, 3] to write to.
            shrink: one of `SHRINKS`, see `TilingPolicy`.

        Returns:
            uint8 [tile_size_px, tile_size_px, 3], transparent pixels in the slide's background colour.

        Raises:
            TileReadError: the reader failed; the next read opens the file anew, because the old handle is dead.
        """
        shape = (tile_size_px, tile_size_px, 3)
        if out is None:
            out = np.empty(shape, dtype=np.uint8)
        elif out.shape != shape or out.dtype != np.uint8:
            raise ValueError(f"out must be uint8 {list(shape)}, got {out.dtype} {list(out.shape)}")
        if not 0 <= level < len(self.level_downsamples):
            # OpenSlide answers with transparent pixels: a white tile in silence.
            raise ValueError(
                f"level must be in [0, {len(self.level_downsamples)}), got {level} (slide {self.slide_id})"
            )
        try:
            self._open().read_tile(int(x), int(y), level, read_size_px, out, shrink)
        except (*READ_ERRORS, SlideError) as error:
            self.close()
            raise TileReadError(self.slide_id, x, y, error) from error
        return out

    def read_overview(self, mpp: float) -> tuple[np.ndarray, float]:
        """The whole slide at `mpp` um/px; see `read_overview_downsampled`."""
        return self.read_overview_downsampled(max(1.0, mpp / self.mpp))

    def read_overview_downsampled(self, downsample: float) -> tuple[np.ndarray, float]:
        """The whole slide, box-averaged, in bounded memory whatever its levels are; warns of unreadable parts.

        Args:
            downsample: level-0 px per pixel of the overview, at least 1.

        Returns:
            uint8 [ceil(height / downsample), ceil(width / downsample), 3], whose pixel (i, j) covers level-0 rows
            from i * downsample and columns from j * downsample; and the downsample.

        Raises:
            SlideError: no part of it can be read.
        """
        pixels, downsample, _ = self.read_overview_with_gaps(downsample)
        return pixels, downsample

    def read_overview_with_gaps(self, downsample: float) -> Overview:
        """The overview that `read_overview_downsampled` reads, and which pixels could not be read.

        Where a part of a level is broken, the levels above it are tried; what none of them has is narrowed down to
        pieces of 64 px.
        """
        level = self._best_level(downsample + 1e-6)
        step = max(1, int(OVERVIEW_BLOCK_PX * self.level_downsamples[level] / downsample))
        height, width = math.ceil(self.height_px / downsample), math.ceil(self.width_px / downsample)
        overview = np.empty((height, width, 3), dtype=np.uint8)
        overview[:] = self._background.astype(np.uint8)
        reader = OverviewReader(self, downsample, overview, OVERVIEW_BLOCK_PX)
        for top in range(0, height, step):
            for left in range(0, width, step):
                reader.fill(top, left, min(step, height - top), min(step, width - left), level)
        if reader.unreadable.any():
            self._tell_gaps(reader)
        return Overview(overview, downsample, reader.unreadable)

    def _best_level(self, downsample: float) -> int:
        """The coarsest level that is not coarser, as OpenSlide chooses it."""
        coarser = (level for level, of_next in enumerate(self.level_downsamples[1:]) if downsample < of_next)
        return next(coarser, len(self.level_downsamples) - 1)

    def _tell_gaps(self, reader: "OverviewReader") -> None:
        where = f"(slide {self.slide_id}, {self.path})"
        if reader.unreadable.all():
            raise SlideError(
                f"slide must be readable for its overview, got {reader.reason} {where}. HINT: replace the file; "
                "--skip_bad_slides leaves it out."
            )
        y, x = (int(pixel[0] * reader.downsample) for pixel in reader.unreadable.nonzero())
        logger.warning(
            "slide %s: %.2g%% of it could not be read for its overview, the first near (%d, %d): %s (%s)",
            *(self.slide_id, 100 * reader.unreadable.mean(), x, y, reader.reason, self.path),
        )

    def block(self, x: float, y: float, level: int, downsample: float, rows: int, columns: int) -> np.ndarray:
        """Box-average the level's pixels from (x, y) (level-0 px) to [rows, columns, 3]; READ_ERRORS pass through."""
        shrink = downsample / self.level_downsamples[level]
        # The read starts on a whole level-0 pixel; the box starts where the overview's pixel does. Not a pixel more is
        # read: it could lie in a part that is broken.
        offset = [(value - int(value)) / self.level_downsamples[level] for value in (x, y)]
        ends = (offset[0] + columns * shrink, offset[1] + rows * shrink)
        size = (max(1, math.ceil(ends[0] - 1e-6)), max(1, math.ceil(ends[1] - 1e-6)))
        region = self._open().read_region(int(x), int(y), level, *size)
        box = (offset[0], offset[1], min(ends[0], size[0]), min(ends[1], size[1]))
        picture = Image.fromarray(np.ascontiguousarray(region))
        return np.asarray(picture.resize((columns, rows), Image.Resampling.BOX, box=box))


class SlideCache:
    """A bounded number of open slides, the least recently used closed first.

    Pickles and forks as an empty cache: file handles belong to the process that opened them, and a file's position is
    shared by both sides of a fork.

    Args:
        max_open: slides that are open at a time.
        reader: see `Slide`.
    """

    def __init__(self, max_open: int = 8, reader: str = AUTO) -> None:
        if max_open < 1:
            raise ValueError(f"max_open must be at least 1, got {max_open}")
        self.max_open, self.reader = max_open, reader
        self._tiles = TileCache()
        self._slides: OrderedDict[tuple[str, float | None, str | None], Slide] = OrderedDict()
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self._slides)

    def __reduce__(self) -> tuple[type, tuple[int, str]]:
        return type(self), (self.max_open, self.reader)

    def get(self, path: str | Path, mpp: float | None = None, slide_id: str | None = None) -> Slide:
        """The open slide of `path`, opened where it is not."""
        if self._pid != os.getpid():
            self._slides.clear()
            self._tiles = TileCache()  # its lock may have been held by a thread that was not forked
            self._pid = os.getpid()
        key = (str(path), mpp, slide_id)
        if key not in self._slides:
            self._slides[key] = Slide(path, mpp, slide_id, reader=self.reader, tiles=self._tiles)
        self._slides.move_to_end(key)
        while len(self._slides) > self.max_open:
            self._slides.popitem(last=False)[1].close()
        return self._slides[key]

    def drop(self, path: str | Path) -> None:
        """Close the slide of that file, where it is open."""
        for key in [key for key in self._slides if key[0] == str(path)]:
            self._slides.pop(key).close()

    def close(self) -> None:
        """Close every slide."""
        while self._slides:
            self._slides.popitem()[1].close()
