"""Which tiles a slide has: a grid at a requested resolution, kept where there is tissue."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ds_wsi.runtime.log import logger
from ds_wsi.slides.slide import Slide, SlideError
from ds_wsi.slides.tissue import tile_fractions, tissue_mask

MPP_TOLERANCE = 0.02  # scanners call 0.499 um/px "20x": nearer than this, pixels are taken as they are
MASK_CELLS_PER_TILE = 16  # along a side, at least: the mask resolves a tile however small it is


@dataclass(frozen=True)
class TilingPolicy:
    """How slides are tiled.

    Args:
        tile_size_px: side of a tile.
        mpp: resolution of the tiles, um/px (0.5 is what scanners call 20x).
        min_tissue_fraction: of a tile's area that must be tissue, in [0, 1].
        overview_mpp: resolution of the tissue mask, um/px; finer where a tile has fewer than 16 of its pixels a side.
        grey_range: grey values that can be tissue, both ends included.
        use_saturation: whether tissue must also be above Otsu's threshold on saturation.
    """

    tile_size_px: int = 256
    mpp: float = 0.5
    min_tissue_fraction: float = 0.6
    overview_mpp: float = 8.0
    grey_range: tuple[int, int] = (3, 230)
    use_saturation: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be tiled with."""
        if self.tile_size_px < 1:
            raise ValueError(f"tile_size_px must be at least 1, got {self.tile_size_px}")
        for name in ("mpp", "overview_mpp"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.min_tissue_fraction <= 1:
            raise ValueError(f"min_tissue_fraction must be in [0, 1], got {self.min_tissue_fraction}")
        if len(self.grey_range) != 2 or not 0 <= self.grey_range[0] <= self.grey_range[1] <= 255:
            raise ValueError(f"grey_range must be two rising values in [0, 255], got {self.grey_range}")


@dataclass(frozen=True, eq=False)
class TileGrid:
    """A slide's tiles.

    Attributes:
        slide_id: of the slide.
        coords: int64 [N, 2], top left (x, y) of each tile, level-0 px, row by row.
        tile_size_px: side of a tile as it is returned.
        tile_size_level0_px: side of a tile at level 0.
        level, read_size_px: where and how large it is read.
        mpp: of the tiles, um/px.
        slide_mpp: of level 0, um/px.
        slide_width_px, slide_height_px: of level 0.
        policy: that chose them.
        source: ds_wsi, or whose coordinates were imported.
    """

    slide_id: str
    coords: np.ndarray
    tile_size_px: int
    tile_size_level0_px: float
    level: int
    read_size_px: int
    mpp: float
    slide_mpp: float
    slide_width_px: int
    slide_height_px: int
    policy: TilingPolicy
    source: str = "ds_wsi"

    def __len__(self) -> int:
        return len(self.coords)


class LevelPlan(NamedTuple):
    """From which level tiles are read: their side there and at level 0, and whether they are resampled."""

    level: int
    read_size_px: int
    tile_size_level0_px: float
    resampled: bool


def plan_level(slide_mpp: float, level_downsamples: Sequence[float], mpp: float, tile_size_px: int) -> LevelPlan:
    """Choose the deepest level that is not coarser than `mpp`, and the square to read there.

    Within 2% of a level its pixels are taken as they are; between levels a larger square of the finer one is read and
    resampled; where even level 0 is coarser than asked, a smaller square of it is enlarged.
    """
    downsample = mpp / slide_mpp
    fine_enough = [level for level, own in enumerate(level_downsamples) if own <= downsample * (1 + MPP_TOLERANCE)]
    level = max(fine_enough, key=lambda index: level_downsamples[index], default=0)
    own = level_downsamples[level]
    ratio = downsample / own
    if abs(ratio - 1) <= MPP_TOLERANCE:
        return LevelPlan(level, tile_size_px, tile_size_px * own, False)
    read_size_px = max(1, round(tile_size_px * ratio))
    return LevelPlan(level, read_size_px, read_size_px * own, True)


def plan_coords(bounds: tuple[int, int, int, int], tile_size_level0_px: float) -> np.ndarray:
    """Top left corners of the whole tiles that fit in bounds (x, y, width, height), row by row: int64 [N, 2]."""
    left, top, width, height = bounds
    # A hair of tolerance: 512 / 1.0000000001 still holds two tiles of 256.
    columns = math.floor(width / tile_size_level0_px + 1e-6)
    rows = math.floor(height / tile_size_level0_px + 1e-6)
    x = left + np.rint(np.arange(columns) * tile_size_level0_px).astype(np.int64)
    y = top + np.rint(np.arange(rows) * tile_size_level0_px).astype(np.int64)
    grid = np.stack(np.meshgrid(x, y), axis=-1)  # [rows, columns, 2]
    return grid.reshape(-1, 2)


def tile_slide(slide: Slide, policy: TilingPolicy) -> TileGrid:
    """Tile a slide: the whole tiles of the scanned area with enough tissue.

    Raises:
        SlideError: no resolution, smaller than a tile, or no tile with enough tissue.
    """
    plan = plan_level(slide.mpp, slide.level_downsamples, policy.mpp, policy.tile_size_px)
    if policy.mpp < slide.mpp / (1 + MPP_TOLERANCE):
        logger.warning(
            "slide %s has %.4g um/px, coarser than the requested %.4g: its tiles are enlarged",
            *(slide.slide_id, slide.mpp, policy.mpp),
        )
    coords = plan_coords(slide.bounds, plan.tile_size_level0_px)
    where = f"(slide {slide.slide_id}, {slide.path})"
    if not len(coords):
        raise SlideError(
            f"slide must hold a tile of {plan.tile_size_level0_px:g} px at level 0, got {slide.width_px} x "
            f"{slide.height_px} px {where}. HINT: a smaller --tile_size_px, or take it out of the manifest."
        )
    fractions = _fractions(slide, policy, plan, coords)
    kept = coords[fractions >= policy.min_tissue_fraction]
    if not len(kept):
        raise SlideError(
            f"slide must have a tile with {policy.min_tissue_fraction:.0%} tissue, got at most {fractions.max():.1%} "
            f"in {len(coords)} tiles {where}. HINT: a lower --min_tissue_fraction, or take it out of the manifest."
        )
    return TileGrid(
        slide_id=slide.slide_id,
        coords=kept,
        tile_size_px=policy.tile_size_px,
        tile_size_level0_px=plan.tile_size_level0_px,
        level=plan.level,
        read_size_px=plan.read_size_px,
        mpp=slide.mpp * plan.tile_size_level0_px / policy.tile_size_px,
        slide_mpp=slide.mpp,
        slide_width_px=slide.width_px,
        slide_height_px=slide.height_px,
        policy=policy,
    )


def _fractions(slide: Slide, policy: TilingPolicy, plan: LevelPlan, coords: np.ndarray) -> np.ndarray:
    finest = plan.tile_size_level0_px * slide.mpp / MASK_CELLS_PER_TILE
    overview, downsample = slide.read_overview(min(policy.overview_mpp, finest))
    mask = tissue_mask(overview, policy.grey_range, policy.use_saturation)
    return tile_fractions(mask, coords / downsample, plan.tile_size_level0_px / downsample)
