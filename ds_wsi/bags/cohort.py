"""A cohort ready to train on: its manifest with splits, and the tile grid (or the file of features) of each slide."""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ds_wsi.bags.features import FeatureFile
from ds_wsi.bags.manifest import SLIDE_ID_RULE, SPLITS, Manifest, ManifestError, SlideEntry, parse_manifest
from ds_wsi.bags.slide_policy import AS_THEY_ARE, SkippedSlide, SlidePolicy, tell_skipped, tell_tissue
from ds_wsi.bags.splits import assign_splits
from ds_wsi.runtime.log import logger
from ds_wsi.slides.coords import read_grid, write_grid
from ds_wsi.slides.masks import MaskFile
from ds_wsi.slides.readers import slide_exists
from ds_wsi.slides.slide import Slide, SlideError
from ds_wsi.slides.tiling import MPP_TOLERANCE, TileGrid, TilingPolicy, tile_slide


@dataclass(frozen=True)
class Cohort:
    """Slides and their grids, row by row; in a cohort of features (`load_feature_cohort`) their files.

    `skipped` are the slides that were left out of both.
    """

    manifest: Manifest
    grids: tuple[TileGrid, ...] | tuple[FeatureFile, ...]
    skipped: tuple[SkippedSlide, ...] = ()

    def rows(self, split: str) -> tuple[int, ...]:
        """The rows of one split."""
        return tuple(row for row, slide in enumerate(self.manifest.slides) if slide.split == split)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tiles of each slide."""
        return tuple(len(grid) for grid in self.grids)

    @property
    def in_dim(self) -> int | None:
        """The width of the features; None in a cohort of slides."""
        first = self.grids[0]
        return first.width if isinstance(first, FeatureFile) else None

    @property
    def tile_grids(self) -> tuple[TileGrid, ...]:
        """The grids of a cohort of slides."""
        grids = tuple(grid for grid in self.grids if isinstance(grid, TileGrid))
        assert len(grids) == len(self.grids)
        return grids


def load_cohort(
    manifest_path: str | Path,
    policy: TilingPolicy,
    *,
    tiles_dir: str | Path | None = None,
    classes: Sequence[str] | None = None,
    slide_mpp: float | None = None,
    seed: int = 0,
    workers: int = 1,
    need_splits: bool = True,
    slides: SlidePolicy = AS_THEY_ARE,
    on_slide: Callable[[int], None] = lambda n_slides: None,
) -> Cohort:
    """Read and check a whole cohort before anything is trained on it.

    Args:
        manifest_path: as `read_manifest` takes it.
        policy: how slides are tiled.
        tiles_dir: grids are kept there, one file a slide, and read again where policy and slide still match.
        classes: class names in the order of the logits.
        slide_mpp: um/px of the slides for which neither manifest nor file gives a plausible one.
        seed: of the splits, where the manifest has none.
        workers: threads that tile.
        need_splits: whether splits are drawn where the manifest has none.
        slides: how they are opened: masks from outside, and whether bad ones are left out.
        on_slide: called with the number of slides whenever one is done.

    Raises:
        ManifestError: lists every problem of the manifest AND of the slide files at once.
    """
    # A file that is missing is a bad slide like another: it is found when it is opened.
    manifest, problems = parse_manifest(manifest_path, classes, need_slides=not slides.skip_bad_slides)
    cohort = tile_manifest(
        *(manifest, policy),
        tiles_dir=tiles_dir,
        slide_mpp=slide_mpp,
        workers=workers,
        problems=problems,
        slides=slides,
        on_slide=on_slide,
    )
    if need_splits:
        cohort = replace(cohort, manifest=assign_splits(cohort.manifest, seed=seed))
    log_splits(cohort)
    return cohort


def tile_manifest(
    manifest: Manifest,
    policy: TilingPolicy,
    *,
    tiles_dir: str | Path | None = None,
    slide_mpp: float | None = None,
    workers: int = 1,
    problems: Sequence[str] = (),
    slides: SlidePolicy = AS_THEY_ARE,
    on_slide: Callable[[int], None] = lambda n_slides: None,
) -> Cohort:
    """Open and tile every slide of a manifest; its splits stay as they are.

    Args:
        manifest: of the slides; files that are missing must be among `problems`.
        policy, tiles_dir, slide_mpp, workers, slides, on_slide: as of `load_cohort`.
        problems: found so far, listed before the slides'.

    Raises:
        ManifestError: lists those problems and every slide's.
    """
    readable = [slide for slide in slides.wanted(manifest.slides) if slides.skip_bad_slides or slide_exists(slide.path)]
    # Slides of one name would write one file at once; a name that is none for a file could lead out of the folder.
    names = Counter(slide.slide_id for slide in readable)
    kept_in = [
        tiles_dir if names[slide.slide_id] == 1 and SLIDE_ID_RULE.fullmatch(slide.slide_id) else None
        for slide in readable
    ]
    if masks := slides.masks_problem(readable):
        problems = [*problems, masks]

    def tile(slide: SlideEntry, kept: str | Path | None) -> tuple[SlideEntry, TileGrid] | SlideError:
        result = _tile(slide, policy, kept, slide_mpp, slides)
        on_slide(len(readable))
        return result

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        results = list(pool.map(tile, readable, kept_in))
    skipped, bad = slides.leave_out(readable, results)
    problems = [*problems, *bad]
    if problems:
        raise ManifestError(manifest.source, problems)
    entries, grids = zip(*(result for result in results if not isinstance(result, SlideError)))
    if slides.skipped is None:  # else another process has told it
        tell_skipped(skipped, len(manifest.slides))
        tell_tissue(grids, with_masks=bool(slides.tissue_masks))
    return Cohort(replace(manifest, slides=entries), grids, skipped)


def log_splits(cohort: Cohort) -> None:
    """Log how many slides and tiles each split has."""
    for split in SPLITS:
        lengths = [cohort.lengths[row] for row in cohort.rows(split)]
        if lengths:
            logger.info(
                "%s: %d slides, %d tiles (%d to %d a slide)",
                *(split, len(lengths), sum(lengths), min(lengths), max(lengths)),
            )


def _tile(
    entry: SlideEntry,
    policy: TilingPolicy,
    tiles_dir: str | Path | None,
    slide_mpp: float | None,
    slides: SlidePolicy,
) -> tuple[SlideEntry, TileGrid] | SlideError:
    """The slide with the mpp to read it at, and its grid; an error is returned, so that all can be listed."""
    try:
        mask = slides.mask_of(entry)
        with Slide(entry.path, entry.mpp, entry.slide_id, fallback_mpp=slide_mpp) as slide:
            own = slide.mpp
            if slide.uses_fallback_mpp:
                entry = replace(entry, mpp=own)
            path = None if tiles_dir is None else Path(tiles_dir) / f"{entry.slide_id}.safetensors"
            grid = _kept_grid(path, slide, own, policy, mask) if path else None
            if grid is None:
                grid = tile_slide(slide, policy, mask)
                if path:
                    write_grid(grid, path)
            return entry, grid
    except SlideError as error:
        return error


def _kept_grid(path: Path, slide: Slide, mpp: float, policy: TilingPolicy, mask: MaskFile | None) -> TileGrid | None:
    if not path.exists():
        return None
    grid = read_grid(path)
    if grid.source != "ds_wsi":
        _require_imported_fits(grid, policy, path)
        return grid
    same_slide = (grid.slide_width_px, grid.slide_height_px) == (slide.width_px, slide.height_px)
    same_mask = (grid.tissue.mask if grid.tissue else "") == (mask.name if mask else "")
    if same_slide and same_mask and grid.slide_mpp == mpp and grid.policy == policy:
        return grid
    logger.warning("%s: tiled with another policy, mask or from another slide file, tiled anew", path)
    return None


def _require_imported_fits(grid: TileGrid, policy: TilingPolicy, path: Path) -> None:
    """An imported grid was chosen by its user: it is taken as it is, or refused, never replaced."""
    if grid.tile_size_px != policy.tile_size_px or abs(grid.mpp / policy.mpp - 1) > MPP_TOLERANCE:
        raise SlideError(
            f"the tile grid imported from {grid.source} must have the run's tiles, {policy.tile_size_px} px at "
            f"{policy.mpp:g} um/px, got {grid.tile_size_px} px at {grid.mpp:.4g} (slide {grid.slide_id}, {path}). "
            "HINT: give --tile_size_px and --mpp its values."
        )
