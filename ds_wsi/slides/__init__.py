"""Slide files and their tiles: opening, tissue, tile grids, coordinates on disk, and the demo's synthetic slides."""

from typing import TYPE_CHECKING

from ds_wsi.runtime.lazy import lazily

if TYPE_CHECKING:
    from ds_wsi.slides.policy import TilingPolicy
    from ds_wsi.slides.slide import Slide, SlideCache, SlideError, TileReadError
    from ds_wsi.slides.tiling import TileGrid, tile_slide

__all__ = ["Slide", "SlideCache", "SlideError", "TileGrid", "TileReadError", "TilingPolicy", "tile_slide"]

# Help pages read the policies alone.
__getattr__ = lazily(
    __name__,
    {
        "ds_wsi.slides.slide": (
            "Slide",
            "SlideCache",
            "SlideError",
            "TileReadError",
        ),
        "ds_wsi.slides.tiling": (
            "TileGrid",
            "tile_slide",
        ),
        "ds_wsi.slides.policy": ("TilingPolicy",),
    },
)
