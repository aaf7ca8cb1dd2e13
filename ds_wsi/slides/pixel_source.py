"""Where a slide's pixels come from: its file's own JPEG tiles where that is proved, else OpenSlide or a plain image.

The pixels are the same to the bit, so that nothing that is computed of them depends on it. What is not read directly,
from a broken tile to a place between pixels, OpenSlide is asked for, and its answer or error is the slide's.
"""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import openslide

from ds_wsi.slides.direct.errors import NotDirectError
from ds_wsi.slides.direct.proved import ProvedSlide, SlideFacts, is_usable, tell_openslide
from ds_wsi.slides.direct.reader import DirectTiff
from ds_wsi.slides.direct.shrink import decoded_scale, read_shrunk, read_tile
from ds_wsi.slides.direct.tile_cache import TileCache
from ds_wsi.slides.errors import SlideError
from ds_wsi.slides.pixels import background_of, opaque, resize
from ds_wsi.slides.policy import AUTO, BOX, READERS
from ds_wsi.slides.readers import open_handle


class PixelSource:
    """An open slide's pixels, of the process that opened it.

    Args:
        path: the slide's file.
        slide_id: names the slide in messages.
        reader: one of `READERS`.
        cache_bytes: how much decoded data OpenSlide keeps.
        tiles: where tiles that are read directly are kept.

    Attributes:
        facts: what the file tells of itself.

    Raises:
        SlideError: no file, no slide, or a slide that cannot be opened.
    """

    def __init__(self, path: Path, slide_id: str, reader: str, cache_bytes: int, tiles: TileCache) -> None:
        if reader not in READERS:
            raise ValueError(f"slide_reader must be one of {', '.join(READERS)}, got {reader!r}")
        self._path, self._slide_id, self._cache_bytes = path, slide_id, cache_bytes
        self._pid = os.getpid()
        self._direct: ProvedSlide | None = None
        self._why_not: dict[int, str] = {}  # levels that are not read directly, and why
        self._why_none = "" if reader == AUTO else f"--slide_reader {reader}"  # of any level
        if reader == AUTO:
            self._direct = ProvedSlide.known(path, tiles)
        self.facts = SlideFacts.of(self.handle) if self._direct is None else self._direct.facts
        self._background = background_of(self.facts.properties)
        if reader == AUTO and self._direct is None and isinstance(self.handle, openslide.OpenSlide):
            try:
                self._direct = ProvedSlide(path, self.facts, tiles)
            except OSError as error:
                self._why_none = str(error)
                tell_openslide(slide_id, path, str(error))

    @cached_property
    def handle(self) -> Any:
        """An `openslide.OpenSlide` or a `PlainImage`, opened when something is not read directly.

        Raises:
            SlideError: the file was replaced by another since it was opened.
        """
        handle = self._open()
        if self._direct is not None and not self._direct.is_at(self._path):
            handle.close()
            raise SlideError(
                f"slide must stay as it was when it was opened, got another file (slide {self._slide_id}, "
                f"{self._path}). HINT: do not change files under a run."
            )
        return handle

    def close(self) -> None:
        """Close the files."""
        if self._pid != os.getpid():
            return  # those of the process that forked this one: they go with the last reference
        if "handle" in vars(self):
            self.handle.close()
        if self._direct is not None:
            self._direct.close()

    def is_stale(self) -> bool:
        """Whether it must be opened anew: the file was written to since, or this process was forked since."""
        return self._pid != os.getpid() or (self._direct is not None and self._direct.is_changed())

    def why_not_shrunk(self, level: int) -> str | None:
        """Why a level cannot be read by "dct", in one line, or None."""
        direct = self._directly(level)
        if direct is None:
            return self._why_not.get(level) or self._why_none or "an image that is no tiled TIFF"
        if direct.levels[level].redrawn.any():
            return f"tiles of level {level} that the file has not, which OpenSlide draws from the level below"
        return None

    def read_tile(self, x: int, y: int, level: int, read_size_px: int, out: np.ndarray, shrink: str = BOX) -> None:
        """Read a square of a level to `out`, uint8 [S, S, 3], shrunk or enlarged to its size; see `Slide.read_tile`.

        Raises:
            READ_ERRORS: the reader failed; the handle is dead.
        """
        direct = self._directly(level)
        scale = decoded_scale(shrink, read_size_px, out.shape[0])
        if scale > 1:
            if direct is None:
                raise NotDirectError(
                    f"tile must be read directly to be shrunk by dct, got {self.why_not_shrunk(level)}"
                )
            read_shrunk(direct, x, y, level, read_size_px, scale, out)
            return
        if direct is not None:
            try:
                read_tile(direct, x, y, level, read_size_px, out.shape[0], out=out)
                return
            except NotDirectError:
                pass  # OpenSlide's answer counts
        pixels = self._by_handle(x, y, level, read_size_px, read_size_px)
        np.copyto(out, pixels if read_size_px == out.shape[0] else resize(pixels, out.shape[0]))

    def read_region(self, x: int, y: int, level: int, width_px: int, height_px: int) -> np.ndarray:
        """A rectangle of a level from (x, y), level-0 px: uint8 [height_px, width_px, 3]; errors as of `read_tile`."""
        direct = self._directly(level)
        if direct is not None:
            try:
                return direct.read_region(x, y, level, width_px, height_px)
            except NotDirectError:
                pass  # OpenSlide's answer counts
        return self._by_handle(x, y, level, width_px, height_px)

    def _by_handle(self, x: int, y: int, level: int, width_px: int, height_px: int) -> np.ndarray:
        return opaque(self.handle.read_region((x, y), level, (width_px, height_px)), self._background)

    def _directly(self, level: int) -> DirectTiff | None:
        """The direct reader where the level is proved."""
        if self._direct is None or level in self._why_not:
            return None
        try:
            return self._direct.reader(level, lambda: self.handle)
        except NotDirectError as error:
            self._why_not[level] = str(error)
            tell_openslide(self._slide_id, self._path, str(error))
        if not is_usable(self.handle):  # the reason is an error of OpenSlide's
            dead, self.handle = self.handle, self._open()
            dead.close()
        return None

    def _open(self) -> Any:
        handle = open_handle(self._path, self._slide_id)
        handle.set_cache(openslide.OpenSlideCache(self._cache_bytes))
        return handle
