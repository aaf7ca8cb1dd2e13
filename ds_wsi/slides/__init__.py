"""From a slide file to its tiles: opening, tissue, tile grids, coordinates on disk, and the demo's synthetic slides."""

from ds_wsi.slides.slide import Slide, SlideCache, SlideError, TileReadError
from ds_wsi.slides.tiling import TileGrid, TilingPolicy, tile_slide

__all__ = ["Slide", "SlideCache", "SlideError", "TileGrid", "TileReadError", "TilingPolicy", "tile_slide"]
