"""Whether what is read directly is what OpenSlide reads."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import openslide

from ds_wsi.slides.direct.errors import NotDirectError
from ds_wsi.slides.direct.levels import Level
from ds_wsi.slides.direct.reader import WHOLE_PIXEL, DirectTiff
from ds_wsi.slides.direct.tile_cache import TileCache
from ds_wsi.slides.pixels import background_of, opaque

MAX_PROBE_PX = 512


def open_direct(path: str | os.PathLike[str], openslide_handle: Any, cache: TileCache | None = None) -> DirectTiff:
    """Open a slide that is proved to be read directly as OpenSlide reads it; see `DirectTiff` and `prove`.

    Raises:
        NotDirectError: it is not; the message is the reason, in one line.
        OSError: the file cannot be opened.
    """
    slide = DirectTiff(path, cache)
    reason = prove(slide, openslide_handle)
    if reason is not None:
        slide.close()
        raise NotDirectError(reason)
    return slide


class Region(NamedTuple):
    """A rectangle: top left in level-0 px, size in px of the level."""

    x0: int
    y0: int
    level: int
    width_px: int
    height_px: int


ReadRegion = Callable[[Region], np.ndarray | None]  # -> uint8 [h, w, 3], or None where it is not to be compared


def prove(slide: DirectTiff, openslide_handle: Any) -> str | None:
    """Why a slide must not be read directly, or None: `prove_geometry`, and `prove_level` of every level."""
    reasons = (prove_level(slide, openslide_handle, number) for number in range(len(slide.levels)))
    return prove_geometry(slide, openslide_handle) or next(filter(None, reasons), None)


def prove_geometry(slide: DirectTiff, told: Any) -> str | None:
    """Why a slide's levels are not OpenSlide's, or None: their number, sizes and downsamples; no pixel is read.

    Args:
        slide: open.
        told: an open `openslide.OpenSlide`, or its properties, level_dimensions and level_downsamples.
    """
    properties = told.properties
    pairs = (
        ("vendor", slide.vendor, properties.get("openslide.vendor")),
        ("background colour", [255, 255, 255], background_of(properties).tolist()),
        ("level sizes", slide.level_dimensions, tuple(told.level_dimensions)),
        ("level downsamples", slide.level_downsamples, tuple(told.level_downsamples)),
    )
    for name, value, other in pairs:
        if value != other:
            return f"{name} must be OpenSlide's, {other}, got {value}"
    return None


def prove_level(slide: DirectTiff, openslide_handle: Any, number: int) -> str | None:
    """Why a level must not be read directly, or None: some tiles are compared with OpenSlide's.

    Compared bit for bit are tiles at two corners and in the middle, and one without bytes; of the finest level also
    those at the other corners and at edges.

    Args:
        slide: open, of a proved geometry.
        openslide_handle: the same file, an open `openslide.OpenSlide`. It can no longer be used where the reason is an
            error of OpenSlide's.
        number: the level.

    Returns:
        The reason in one line, or None where nothing differs.
    """
    level, background = slide.levels[number], background_of(openslide_handle.properties)
    if level.redrawn.all():
        return None  # nothing of it is read directly

    def read_directly(region: Region) -> np.ndarray | None:
        try:
            return slide.read_region(*region)
        except NotDirectError:
            return None  # and OpenSlide will be asked for it

    def read_by_openslide(region: Region) -> np.ndarray:
        x0, y0, level, *size = region
        return opaque(openslide_handle.read_region((x0, y0), level, tuple(size)), background)

    try:
        reason = difference(_probes(number, level), read_directly, read_by_openslide)
    except (openslide.OpenSlideError, OSError) as error:
        return f"level {number}: OpenSlide must read what is read directly, got {error}"
    return f"level {number}: {reason}" if reason else None


def difference(regions: Iterable[Region], read: ReadRegion, read_reference: ReadRegion) -> str | None:
    """Why two readers are not the same, or None; what a reader gives None for is left out.

    Args:
        regions: what is compared; one of them at least must be read by both.
        read: asked first.
        read_reference: asked for what `read` has read.
    """
    n_compared = 0
    for region in regions:
        pixels = read(region)
        reference = None if pixels is None else read_reference(region)
        if pixels is None or reference is None:
            continue
        if not np.array_equal(pixels, reference):
            return f"pixels at ({region.x0}, {region.y0}) must be OpenSlide's, got others"
        n_compared += 1
    return None if n_compared else "a tile at least must be readable, got none of those that were tried"


def _probes(number: int, level: Level) -> Iterator[Region]:
    """Tiles of a level: corners, one inside, one that the file has and one that it has not; of the finest, borders."""
    page = level.page
    right, bottom = page.columns - 1, page.rows - 1
    tiles = [(0, 0), (bottom, right), (bottom // 2, right // 2)]
    if number == 0:
        tiles += [(0, right), (bottom, 0), (bottom, right // 2), (bottom // 2, right)]
    is_absent = page.byte_counts == 0
    for group in (is_absent & ~level.redrawn, ~is_absent & ~level.redrawn):
        indices = group.nonzero()[0]
        if indices.size:
            tiles.append(divmod(int(indices[indices.size // 2]), page.columns))
    width, height = min(page.tile_width_px, MAX_PROBE_PX), min(page.tile_height_px, MAX_PROBE_PX)
    across, down = _whole_places(page.width_px, level.downsample), _whole_places(page.height_px, level.downsample)
    for row, column in dict.fromkeys(tiles):
        x0 = _nearest(across, column * page.tile_width_px * level.downsample)
        y0 = _nearest(down, row * page.tile_height_px * level.downsample)
        yield Region(x0, y0, number, width, height)


def _whole_places(side_px: int, downsample: float) -> np.ndarray:
    """The level-0 pixels that lie on a pixel of a level: the first at least does."""
    places = np.arange(math.ceil(side_px * downsample))
    positions = places / downsample
    return places[np.abs(positions - np.round(positions)) <= WHOLE_PIXEL]


def _nearest(places: np.ndarray, position: float) -> int:
    return int(places[np.abs(places - position).argmin()])
