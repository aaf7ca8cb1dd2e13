"""A slide file, opened with OpenSlide: its geometry, its resolution, its tiles."""

import math
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import openslide
from PIL import Image

PLAUSIBLE_MPP = (0.05, 10.0)  # um/px at level 0: from 100x oil immersion to a macro camera
MPP_HINT = "HINT: give the true value in the manifest's `mpp` column, or with --slide_mpp."
CM_IN_UM, INCH_IN_UM = 10_000.0, 25_400.0
OVERVIEW_BLOCK_PX = 2048  # of the level read at a time: bounds the memory of an overview


class SlideError(ValueError):
    """A slide that cannot be used; the message names it, the reason and the remedy."""


class TileReadError(SlideError):
    """A tile that could not be read.

    Attributes:
        slide_id, x, y: which, level-0 px.
        cause: the error below.
    """

    def __init__(self, slide_id: str, x: int, y: int, cause: Exception) -> None:
        self.slide_id, self.x, self.y, self.cause = slide_id, x, y, cause
        super().__init__(f"tile at ({x}, {y}) of slide {slide_id} must be readable, got {cause}")

    def __reduce__(self) -> tuple[type, tuple[str, int, int, Exception]]:
        # An exception is pickled with its message as the only argument, which this class could not be made from.
        return type(self), (self.slide_id, self.x, self.y, self.cause)


class Slide:
    """An open slide, with a tile cache of its own of bounded size.

    Args:
        path: of the file.
        mpp: um/px at level 0, where the file's own is missing or wrong.
        slide_id: names the slide in messages; by default the file's stem.
        cache_bytes: of decoded data that OpenSlide keeps for this slide.

    Raises:
        SlideError: no file, no slide, or a slide that OpenSlide cannot open.
    """

    def __init__(
        self, path: str | Path, mpp: float | None = None, slide_id: str | None = None, cache_bytes: int = 2**25
    ) -> None:
        self.path = Path(path)
        self.slide_id = slide_id or self.path.stem
        self._mpp = mpp
        self._cache_bytes = cache_bytes
        self._handle: Any = None
        handle = self._open()
        self.width_px, self.height_px = handle.dimensions
        self.level_dimensions: tuple[tuple[int, int], ...] = handle.level_dimensions
        self.level_downsamples: tuple[float, ...] = handle.level_downsamples
        self._properties = dict(handle.properties)
        self._background = _background(self._properties)

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def _open(self) -> Any:
        if self._handle is not None:
            return self._handle
        where = f"(slide {self.slide_id}, {self.path})"
        if not self.path.is_file():
            raise SlideError(f"slide must be a file, got none {where}. HINT: check the manifest's `path`.")
        try:
            self._handle = openslide.OpenSlide(str(self.path))
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise SlideError(f"slide must be in a format of OpenSlide's, got none of them {where}") from error
        except openslide.OpenSlideError as error:
            raise SlideError(f"slide must be readable by OpenSlide, got {error} {where}") from error
        self._handle.set_cache(openslide.OpenSlideCache(self._cache_bytes))
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
        """Resolution of level 0, um/px.

        Raises:
            SlideError: the file names none and no override was given, or the value is implausible.
        """
        value, source = self._found_mpp()
        low, high = PLAUSIBLE_MPP
        if value is None:
            raise SlideError(
                f"slide must tell its resolution, got no mpp (slide {self.slide_id}, {self.path}). {MPP_HINT}"
            )
        if not low <= value <= high:
            raise SlideError(
                f"mpp must be in [{low}, {high}] um/px to be plausible, got {value:g} from {source} "
                f"(slide {self.slide_id}, {self.path}). {MPP_HINT}"
            )
        return value

    @property
    def mpp_source(self) -> str:
        """Where the resolution comes from."""
        return self._found_mpp()[1]

    def _found_mpp(self) -> tuple[float | None, str]:
        if self._mpp is not None:
            return self._mpp, "the override"
        found = [_number(self._properties.get(f"openslide.mpp-{axis}")) for axis in "xy"]
        if found[0] and found[1]:
            return (found[0] + found[1]) / 2, "openslide.mpp-x and -y"
        unit = {"centimeter": CM_IN_UM, "inch": INCH_IN_UM}.get(self._properties.get("tiff.ResolutionUnit", ""))
        per_unit = _number(self._properties.get("tiff.XResolution"))
        if unit and per_unit:
            return unit / per_unit, "the TIFF resolution tags"
        return None, "nothing"

    def read_tile(
        self, x: int, y: int, level: int, read_size_px: int, tile_size_px: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Read a square tile.

        Args:
            x, y: its top left, level-0 px.
            level: to read from.
            read_size_px: its side at that level.
            tile_size_px: its side when returned; resampled where the two differ.
            out: uint8 [tile_size_px, tile_size_px, 3] to write to.

        Returns:
            uint8 [tile_size_px, tile_size_px, 3], transparent pixels in the slide's background colour.

        Raises:
            TileReadError: OpenSlide failed; the next read opens the file anew, for the old handle is dead.
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
            region = self._open().read_region((int(x), int(y)), level, (read_size_px, read_size_px))
        except (openslide.OpenSlideError, SlideError) as error:
            self.close()
            raise TileReadError(self.slide_id, x, y, error) from error
        tile = self._opaque(region)
        np.copyto(out, tile if read_size_px == tile_size_px else _resize(tile, tile_size_px))
        return out

    def _opaque(self, region: Image.Image) -> np.ndarray:
        """RGBA to uint8 RGB [h, w, 3] on the slide's background."""
        if np.frombuffer(region.tobytes("raw", "A"), dtype=np.uint8).min() == 255:
            # Pillow's encoder drops the alpha on the way: several times faster than NumPy's copy of 3 bytes in 4.
            rgb = np.frombuffer(region.tobytes("raw", "RGB"), dtype=np.uint8)
            return rgb.reshape(region.height, region.width, 3)
        rgba = np.asarray(region)
        alpha = rgba[..., 3]
        weight = alpha[..., None].astype(np.float32) / 255
        return np.rint(rgba[..., :3] * weight + self._background * (1 - weight)).astype(np.uint8)

    def read_overview(self, mpp: float) -> tuple[np.ndarray, float]:
        """The whole slide at `mpp` um/px; see `read_overview_downsampled`."""
        return self.read_overview_downsampled(max(1.0, mpp / self.mpp))

    def read_overview_downsampled(self, downsample: float) -> tuple[np.ndarray, float]:
        """The whole slide, box-averaged, in bounded memory whatever its levels are.

        Args:
            downsample: level-0 px a pixel of the overview, at least 1.

        Returns:
            uint8 [ceil(height / downsample), ceil(width / downsample), 3], whose pixel (i, j) covers level-0 rows
            from i * downsample and columns from j * downsample; and the downsample.
        """
        handle = self._open()
        level = handle.get_best_level_for_downsample(downsample + 1e-6)
        shrink = downsample / self.level_downsamples[level]
        step = max(1, int(OVERVIEW_BLOCK_PX / shrink))
        height, width = math.ceil(self.height_px / downsample), math.ceil(self.width_px / downsample)
        overview = np.empty((height, width, 3), dtype=np.uint8)
        for top in range(0, height, step):
            for left in range(0, width, step):
                rows, columns = min(step, height - top), min(step, width - left)
                overview[top : top + rows, left : left + columns] = self._block(
                    left * downsample, top * downsample, level, shrink, rows, columns
                )
        return overview, downsample

    def _block(self, x: float, y: float, level: int, shrink: float, rows: int, columns: int) -> np.ndarray:
        """Box-average the level's pixels from (x, y) (level-0 px) to [rows, columns, 3]."""
        size = (math.ceil(columns * shrink) + 1, math.ceil(rows * shrink) + 1)
        try:
            region = self._open().read_region((int(x), int(y)), level, size)
        except openslide.OpenSlideError as error:
            self.close()
            raise SlideError(
                f"slide must be readable for its overview, got {error} near ({int(x)}, {int(y)}) "
                f"(slide {self.slide_id}, {self.path})"
            ) from error
        # The read starts on a whole level-0 pixel; the box starts where the overview's pixel does.
        offset = [(value - int(value)) / self.level_downsamples[level] for value in (x, y)]
        box = (offset[0], offset[1], offset[0] + columns * shrink, offset[1] + rows * shrink)
        box = (box[0], box[1], min(box[2], size[0]), min(box[3], size[1]))
        picture = Image.fromarray(np.ascontiguousarray(self._opaque(region)))
        return np.asarray(picture.resize((columns, rows), Image.Resampling.BOX, box=box))


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text else 0.0
    except ValueError:
        return None
    return value if value > 0 and math.isfinite(value) else None


def _background(properties: dict[str, str]) -> np.ndarray:
    colour = properties.get("openslide.background-color", "FFFFFF")
    return np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)], dtype=np.float32)


def _resize(tile: np.ndarray, side_px: int) -> np.ndarray:
    # The box average is the physical answer when shrinking; enlarging interpolates.
    how = Image.Resampling.BOX if tile.shape[0] > side_px else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(np.ascontiguousarray(tile)).resize((side_px, side_px), how))


class SlideCache:
    """A bounded number of open slides, the least recently used closed first.

    Pickles and forks as an empty cache: file handles belong to the process that opened them, and a file's position is
    shared by both sides of a fork.
    """

    def __init__(self, max_open: int = 8) -> None:
        if max_open < 1:
            raise ValueError(f"max_open must be at least 1, got {max_open}")
        self.max_open = max_open
        self._slides: OrderedDict[tuple[str, float | None, str | None], Slide] = OrderedDict()
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self._slides)

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return type(self), (self.max_open,)

    def get(self, path: str | Path, mpp: float | None = None, slide_id: str | None = None) -> Slide:
        """The open slide of `path`, opened where it is not."""
        if self._pid != os.getpid():
            self._slides.clear()
            self._pid = os.getpid()
        key = (str(path), mpp, slide_id)
        if key not in self._slides:
            self._slides[key] = Slide(path, mpp, slide_id)
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
