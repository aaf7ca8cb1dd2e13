"""Whether slides can be read: one is drawn, written, opened and tiled."""

from pathlib import Path

from ds_wsi.doctor.apart import finding_apart
from ds_wsi.doctor.finding import FAIL, PASS, Finding

SLIDE_S = 60
SIDE_PX, TILE_PX = 512, 128
GREY_LEVELS = 8  # that JPEG may change of a smooth picture
_REMEDY = "pip install --force-reinstall openslide-python openslide-bin tifffile imagecodecs simplejpeg"


def check_slide() -> Finding:
    """Whether a pyramidal TIFF is written, opened and tiled, with the pixels that it was written with."""
    return finding_apart(read_a_slide, timeout_s=SLIDE_S, remedy=_REMEDY)


def read_a_slide() -> Finding:
    """Write a slide of two levels into the working folder and read its tiles. In a process of its own."""
    import numpy as np

    from ds_wsi.slides import Slide, SlideError, TileReadError, TilingPolicy, tile_slide
    from ds_wsi.slides.pyramid import write_pyramid

    ramp = np.linspace(40, 215, SIDE_PX)
    picture = np.stack([*np.meshgrid(ramp, ramp), np.full((SIDE_PX, SIDE_PX), 128.0)], axis=-1).astype(np.uint8)
    path = Path("slide.tiff")
    write_pyramid(path, picture, mpp=0.5)
    n_tiles, worst = 0, 0
    try:
        with Slide(path) as slide:
            for scale in (1, 2):
                grid = tile_slide(slide, TilingPolicy(tile_size_px=TILE_PX, mpp=0.5 * scale, tissue="none"))
                shown = picture.reshape(SIDE_PX // scale, scale, SIDE_PX // scale, scale, 3).mean((1, 3))
                for x, y in grid.coords.tolist():
                    tile = slide.read_tile(x, y, grid.level, grid.read_size_px, TILE_PX)
                    part = shown[y // scale : y // scale + TILE_PX, x // scale : x // scale + TILE_PX]
                    worst = max(worst, int(np.abs(tile - part).max()))
                    n_tiles += 1
            levels = len(slide.level_dimensions)
    except (SlideError, TileReadError) as error:
        return Finding(FAIL, str(error), _REMEDY)
    if worst > GREY_LEVELS or not n_tiles:
        return Finding(FAIL, f"{n_tiles} tiles, of which pixels are wrong by {worst} grey levels", _REMEDY)
    return Finding(PASS, f"{n_tiles} tiles of {levels} levels, pixels within {worst} grey levels")
