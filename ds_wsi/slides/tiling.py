"""The tiles of a slide: a grid at a requested resolution, kept where there is tissue."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ds_wsi.runtime.log import logger
from ds_wsi.slides.masks import MaskFile, read_mask
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.slides.slide import Slide, SlideError, TileReadError
from ds_wsi.slides.tissue import grey_mask, tile_fractions, tissue_mask, white_glass

MPP_TOLERANCE = 0.02  # scanners call 0.499 um/px "20x": nearer than this, pixels are taken as they are
MASK_CELLS_PER_TILE = 16  # along a side, at least: the mask resolves a tile however small it is
TRIED_TILES = 5  # of each slide, before it is taken
MAX_UNREADABLE = 0.5  # of a slide's tiles


@dataclass(frozen=True)
class TissueFound:
    """What a slide was found to hold.

    Attributes:
        share: the part of the scanned area that is tissue.
        grey_share: the part of the scanned area in the grey range once its glass is white; None where a mask from
            outside decides.
        n_whole: whole tiles of the scanned area, of which the grid's are those with enough tissue.
        n_unreadable: tiles of the grid that are there only because their part of the overview could not be read.
        mask: the file that said what is tissue, with its checksum, or empty.
    """

    share: float
    grey_share: float | None
    n_whole: int
    n_unreadable: int = 0
    mask: str = ""


@dataclass(frozen=True, eq=False)
class TileGrid:
    """A slide's tiles.

    Attributes:
        slide_id: the slide's name.
        coords: int64 [N, 2], top left (x, y) of each tile, level-0 px, row by row.
        tile_size_px: side of a tile as it is returned.
        tile_size_level0_px: side of a tile at level 0.
        level, read_size_px: where and how large it is read.
        mpp: resolution of the tiles, um/px.
        slide_mpp: resolution of level 0, um/px.
        slide_width_px, slide_height_px: size of level 0.
        policy: the policy that chose the tiles.
        source: ds_wsi, or whose coordinates were imported.
        tissue: what was found; None of imported grids, and of those that earlier versions wrote.
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
    tissue: TissueFound | None = None

    def __len__(self) -> int:
        return len(self.coords)


class LevelPlan(NamedTuple):
    """The level that tiles are read from: their side there and at level 0, and whether they are resampled."""

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
    fine_enough = [
        level
        for level, level_downsample in enumerate(level_downsamples)
        if level_downsample <= downsample * (1 + MPP_TOLERANCE)
    ]
    level = max(fine_enough, key=lambda index: level_downsamples[index], default=0)
    level_downsample = level_downsamples[level]
    ratio = downsample / level_downsample
    if abs(ratio - 1) <= MPP_TOLERANCE:
        return LevelPlan(level, tile_size_px, tile_size_px * level_downsample, False)
    read_size_px = max(1, round(tile_size_px * ratio))
    return LevelPlan(level, read_size_px, read_size_px * level_downsample, True)


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


def tile_slide(slide: Slide, policy: TilingPolicy, mask: MaskFile | None = None) -> TileGrid:
    """Tile a slide: the whole tiles of the scanned area with enough tissue.

    A tile whose part of the overview could not be read may be tissue: it is kept, and fails when it is read.

    Args:
        slide: open.
        policy: how.
        mask: a file that says where tissue is, in place of the policy's rule; see `read_mask`.

    Raises:
        SlideError: no resolution, smaller than a tile, no tile with enough tissue, most of it unreadable, or a mask
            that is none of this slide's.
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
            f"{slide.height_px} px {where}. HINT: take it out of the manifest, or leave it out with --skip_bad_slides; "
            "a smaller tile_size_px fits."
        )
    slide.require_shrink(policy.shrink, plan.level, plan.read_size_px, policy.tile_size_px)
    kept, tissue = _with_tissue(slide, policy, plan, coords, mask, where)
    _require_readable(slide, plan, policy, kept, where)
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
        tissue=tissue,
    )


def _require_readable(slide: Slide, plan: LevelPlan, policy: TilingPolicy, coords: np.ndarray, where: str) -> None:
    """Refuse a slide of which some tiles, spread over the grid, all fail: its overview may come from another level."""
    tried = coords[np.linspace(0, len(coords) - 1, min(TRIED_TILES, len(coords))).astype(int)]
    for x, y in tried.tolist():
        try:
            slide.read_tile(x, y, plan.level, plan.read_size_px, policy.tile_size_px, shrink=policy.shrink)
            return
        except TileReadError as error:
            reason = str(error.cause)
    raise SlideError(
        f"slide must have readable tiles, got {reason} at all {len(tried)} that were tried {where}. HINT: replace the "
        "file; --skip_bad_slides leaves it out."
    )


def _with_tissue(
    slide: Slide, policy: TilingPolicy, plan: LevelPlan, coords: np.ndarray, mask: MaskFile | None, where: str
) -> tuple[np.ndarray, TissueFound]:
    """The tiles with enough tissue, and what was found."""
    if policy.tissue == "none" and mask is None:
        return coords, TissueFound(1.0, None, len(coords))
    tissue = find_tissue(slide, policy, mask, plan.tile_size_level0_px)
    corners, side = coords / tissue.downsample, plan.tile_size_level0_px / tissue.downsample
    fractions = tile_fractions(tissue.mask, corners, side)
    enough = fractions >= policy.min_tissue_fraction
    maybe = tile_fractions(tissue.mask | tissue.unreadable, corners, side) >= policy.min_tissue_fraction
    if not maybe.any():
        raise SlideError(
            f"slide must have a tile with {policy.min_tissue_fraction:.0%} tissue, got at most {fractions.max():.1%} "
            f"in {len(coords)} tiles {where}. HINT: a lower --min_tissue_fraction, another --tissue, a mask of your "
            "own with --tissue_masks, or take it out of the manifest."
        )
    n_unreadable = int((maybe & ~enough).sum())
    if n_unreadable > MAX_UNREADABLE * maybe.sum():
        raise SlideError(
            f"slide must be readable for its overview in most tiles, got {n_unreadable} of {maybe.sum()} that are not "
            f"{where}. HINT: replace the file; --skip_bad_slides leaves it out."
        )
    share, grey_share = tissue.shares(slide)
    return coords[maybe], TissueFound(share, grey_share, len(coords), n_unreadable, "" if mask is None else mask.name)


class SlideTissue(NamedTuple):
    """A slide's tissue.

    Attributes:
        mask: bool [H, W].
        grey: bool [H, W], the pixels in the grey range once the glass is white; None where a mask from outside decides.
        unreadable: bool [H, W], what could not be read.
        downsample: level-0 px per pixel.
    """

    mask: np.ndarray
    grey: np.ndarray | None
    unreadable: np.ndarray
    downsample: float

    def shares(self, slide: Slide) -> tuple[float, float | None]:
        """The shares of the scanned area that are tissue, and in the grey range."""
        x, y, width, height = (value / self.downsample for value in slide.bounds)
        area = slice(int(y), math.ceil(y + height)), slice(int(x), math.ceil(x + width))
        return float(self.mask[area].mean()), None if self.grey is None else float(self.grey[area].mean())


def find_tissue(
    slide: Slide, policy: TilingPolicy, mask: MaskFile | None = None, tile_size_level0_px: float | None = None
) -> SlideTissue:
    """Find a slide's tissue: by the policy's rule in its overview, or as a mask from outside has it.

    Args:
        slide: open.
        policy: gives the rule and the resolution of the overview.
        mask: a file that says where tissue is.
        tile_size_level0_px: side of a tile that the overview resolves; by default the side of the policy's tiles.
    """
    if tile_size_level0_px is None:
        plan = plan_level(slide.mpp, slide.level_downsamples, policy.mpp, policy.tile_size_px)
        tile_size_level0_px = plan.tile_size_level0_px
    finest = tile_size_level0_px * slide.mpp / MASK_CELLS_PER_TILE
    downsample = max(1.0, min(policy.overview_mpp, finest) / slide.mpp)
    if mask is not None:
        mask_here = read_mask(mask, slide, downsample)
        return SlideTissue(mask_here, None, np.zeros_like(mask_here), downsample)
    overview = slide.read_overview_with_gaps(downsample)
    white = white_glass(overview.pixels, policy.grey_range)
    grey = grey_mask(white, policy.grey_range)
    mask_here = tissue_mask(overview.pixels, policy.tissue, slide.mpp * downsample, policy.grey_range, white)
    return SlideTissue(mask_here & ~overview.unreadable, grey & ~overview.unreadable, overview.unreadable, downsample)
