"""The levels of a slide that are read directly: those that this process has found to have OpenSlide's pixels.

[Note: what is proved once] A proof costs about ten tiles of a level. It is made when a tile of the level is wanted, and
holds for the file as it is (device, inode, size, times) until the process ends; processes that are forked begin with
what was known. What OpenSlide tells of the file is known for as long, because to open it, OpenSlide takes as long as
for eight tiles. It is not kept on disk: the version of every decoder would have to be known there too.
"""

import mmap
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import openslide

from ds_wsi.runtime.log import logger
from ds_wsi.slides.direct.errors import NotDirectError
from ds_wsi.slides.direct.levels import APERIO, GENERIC
from ds_wsi.slides.direct.proof import prove_geometry, prove_level
from ds_wsi.slides.direct.reader import DirectTiff
from ds_wsi.slides.direct.tiff_layout import Identity, identity_of
from ds_wsi.slides.direct.tile_cache import TileCache

MAX_KNOWN = 2**16  # levels
MAX_TOLD = 2**12  # slides, a few kB each
# File and level -> why it is not read directly, or None; see [Note: what is proved once].
_known: dict[tuple[Identity, int], str | None] = {}
_facts: "dict[Identity, SlideFacts]" = {}  # of the slides whose geometry is proved
_told = mmap.mmap(-1, 1)  # shared with forked processes: one line for all that read


class SlideFacts(NamedTuple):
    """What OpenSlide, or another reader with its names, tells of a file, its pixels aside."""

    dimensions: tuple[int, int]
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    properties: Mapping[str, str]

    @classmethod
    def of(cls, handle: Any) -> "SlideFacts":
        """The facts of an open file."""
        # A name that is no UTF-8 is listed with other letters than it can be asked for.
        texts = ((name, handle.properties.get(name)) for name in handle.properties)
        properties = {name: text for name, text in texts if text is not None}
        return cls(handle.dimensions, tuple(handle.level_dimensions), tuple(handle.level_downsamples), properties)


class ProvedSlide:
    """The direct reader of a slide, level by level.

    Args:
        path: the slide's file.
        facts: what OpenSlide tells of the file.
        cache: where decoded tiles are kept.

    Raises:
        NotDirectError: the file is not read directly; the message is the reason, in one line.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], facts: SlideFacts, cache: TileCache) -> None:
        vendor = facts.properties.get("openslide.vendor")
        if vendor not in (APERIO, GENERIC):
            raise NotDirectError(f"format must be {APERIO} or {GENERIC}, got {vendor}")
        self._slide = DirectTiff(path, cache)
        self._identity = self._slide.file.identity
        self._levels: dict[int, str | None] = {}
        self.facts = facts
        if reason := prove_geometry(self._slide, facts):
            self.close()
            raise NotDirectError(reason)
        while len(_facts) >= MAX_TOLD:
            _facts.pop(next(iter(_facts), self._identity), None)  # another thread may do so at any moment
        _facts[self._identity] = facts

    @classmethod
    def known(cls, path: str | os.PathLike[str], cache: TileCache) -> "ProvedSlide | None":
        """The direct reader of a file whose geometry was proved before; None of another, or where it cannot be read."""
        try:
            facts = _facts.get(identity_of(os.stat(path)))
            slide = None if facts is None else cls(path, facts, cache)
        except OSError:
            return None
        if slide is None or _facts.get(slide._identity) == facts:
            return slide
        slide.close()  # the file was changed in between
        return None

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

    def is_at(self, path: str | os.PathLike[str]) -> bool:
        """Whether the path still names the file that was opened, as it was."""
        try:
            return identity_of(os.stat(path)) == self._identity
        except OSError:
            return False

    def reader(self, level: int, openslide_handle: Callable[[], Any]) -> DirectTiff:
        """The reader, where the level is proved, by now or before.

        Args:
            level: the level that is wanted.
            openslide_handle: called for what `prove_level` takes, where there is something to prove.

        Raises:
            NotDirectError: the level is not read directly; the message is the reason, in one line.
        """
        if level not in self._levels:
            self._levels[level] = self._verdict(level, openslide_handle)
        reason = self._levels[level]
        if reason is not None:
            raise NotDirectError(reason)
        return self._slide

    def _verdict(self, level: int, openslide_handle: Callable[[], Any]) -> str | None:
        key = (self._identity, level)
        try:
            return _known[key]
        except KeyError:
            pass
        if len(_known) >= MAX_KNOWN:
            _known.clear()  # another thread may do so at any moment
        verdict = _known[key] = prove_level(self._slide, openslide_handle(), level)
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
