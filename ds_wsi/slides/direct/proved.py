"""The levels of a slide that are read directly: those that this process has found to have OpenSlide's pixels.

[Note: what is proved once] A proof costs about ten tiles of a level. It is made when a tile of the level is wanted, and
holds for the file as it is (device, inode, size, times) until the process ends; processes that are forked begin with
what was known. It is not kept on disk: the version of every decoder would have to be known there too.
"""

import mmap
import os
from typing import Any

import openslide

from ds_wsi.runtime.log import logger
from ds_wsi.slides.direct.errors import NotDirectError
from ds_wsi.slides.direct.levels import APERIO, GENERIC
from ds_wsi.slides.direct.proof import prove_geometry, prove_level
from ds_wsi.slides.direct.reader import DirectTiff
from ds_wsi.slides.direct.tiff_layout import Identity
from ds_wsi.slides.direct.tile_cache import TileCache

MAX_KNOWN = 2**16  # levels
# File and level -> why it is not read directly, or None; see [Note: what is proved once].
_known: dict[tuple[Identity, int], str | None] = {}
_told = mmap.mmap(-1, 1)  # shared with forked processes: one line for all that read


class ProvedSlide:
    """The direct reader of a slide, level by level.

    Args:
        path: the slide's file.
        openslide_handle: the same file, an open `openslide.OpenSlide`.
        cache: where decoded tiles are kept.

    Raises:
        NotDirectError: the file is not read directly; the message is the reason, in one line.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], openslide_handle: Any, cache: TileCache) -> None:
        vendor = openslide_handle.properties.get("openslide.vendor")
        if vendor not in (APERIO, GENERIC):
            raise NotDirectError(f"format must be {APERIO} or {GENERIC}, got {vendor}")
        self._slide = DirectTiff(path, cache)
        self._identity = self._slide.file.identity
        self._levels: dict[int, str | None] = {}
        if reason := prove_geometry(self._slide, openslide_handle):
            self.close()
            raise NotDirectError(reason)

    def close(self) -> None:
        """Close the file and let its tiles go."""
        self._slide.close()

    def is_changed(self) -> bool:
        """Whether the file was written to since it was opened, so that neither places nor kept tiles hold any more."""
        # Without the last time, which also changes where another file takes the name: the open one can still be read.
        try:
            return self._slide.file.identity[:-1] != self._identity[:-1]
        except OSError:  # of a share, where another file took the name
            return True

    def reader(self, level: int, openslide_handle: Any) -> DirectTiff:
        """The reader, where the level is proved, by now or before.

        Args:
            level: the level that is wanted.
            openslide_handle: see `prove_level`.

        Raises:
            NotDirectError: the level is not read directly; the message is the reason, in one line.
        """
        if level not in self._levels:
            self._levels[level] = self._verdict(level, openslide_handle)
        reason = self._levels[level]
        if reason is not None:
            raise NotDirectError(reason)
        return self._slide

    def _verdict(self, level: int, openslide_handle: Any) -> str | None:
        key = (self._identity, level)
        try:
            return _known[key]
        except KeyError:
            pass
        if len(_known) >= MAX_KNOWN:
            _known.clear()  # another thread may do so at any moment
        verdict = _known[key] = prove_level(self._slide, openslide_handle, level)
        return verdict


def tell_openslide(slide_id: str, path: str | os.PathLike[str], reason: str) -> None:
    """Say why a slide is not read directly: once in this process and those that it forks, to debuggers always."""
    words = "slide %s is read by OpenSlide and not directly, which would be faster: %s (%s)"
    if _told[0]:
        logger.debug(words, slide_id, reason, path)
        return
    _told[0] = 1
    logger.info(words + "; the same of other slides is not told", slide_id, reason, path)


def is_usable(openslide_handle: Any) -> bool:
    """Whether a handle can still be read from: an error of OpenSlide's is its end."""
    try:
        return bool(openslide_handle.level_count)
    except openslide.OpenSlideError:
        return False
