"""A cohort ready to train on: its manifest with splits, and the tile grid (or the file of features) of each slide."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ds_wsi.bags.features import FeatureFile
from ds_wsi.bags.manifest import Manifest, ManifestError, SlideEntry, parse_manifest
from ds_wsi.bags.splits import assign_splits
from ds_wsi.bags.summary import log_cohort
from ds_wsi.runtime.log import logger
from ds_wsi.slides.coords import read_grid, write_grid
from ds_wsi.slides.slide import Slide, SlideError
from ds_wsi.slides.tiling import MPP_TOLERANCE, TileGrid, TilingPolicy, tile_slide


@dataclass(frozen=True)
class Cohort:
    """Slides and their grids, row by row; in a cohort of features (`load_feature_cohort`) their files."""

    manifest: Manifest
    grids: tuple[TileGrid, ...] | tuple[FeatureFile, ...]

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
    labels: str = "required",
    choose: Callable[[Manifest], Manifest] | None = None,
) -> Cohort:
    """Read and check a whole cohort before anything is trained on it: the table first, then the slides.

    Args:
        manifest_path: as `read_manifest` takes it.
        policy: how slides are tiled.
        tiles_dir: grids are kept there, one file a slide, and read again where policy and slide still match.
        classes: class names in the order of the logits.
        slide_mpp: um/px of the slides for which neither manifest nor file gives a plausible one.
        seed: of the splits, where the manifest has none.
        workers: threads that tile.
        need_splits: whether splits are drawn where the manifest has none.
        labels: as of `parse_manifest`.
        choose: takes the slides that are wanted, before any is opened.

    Raises:
        ManifestError: lists every problem of the manifest, before a slide is opened; else every problem of the slides.
    """
    manifest, problems = parse_manifest(manifest_path, classes, labels=labels)
    if problems:
        raise ManifestError(manifest.source, problems)
    manifest = manifest if choose is None else choose(manifest)
    cohort = tile_manifest(manifest, policy, tiles_dir=tiles_dir, slide_mpp=slide_mpp, workers=workers)
    if need_splits:
        cohort = replace(cohort, manifest=assign_splits(cohort.manifest, seed=seed))
    log_cohort(cohort.manifest, cohort.lengths)
    return cohort


def tile_manifest(
    manifest: Manifest,
    policy: TilingPolicy,
    *,
    tiles_dir: str | Path | None = None,
    slide_mpp: float | None = None,
    workers: int = 1,
) -> Cohort:
    """Open and tile every slide of a manifest; its splits stay as they are.

    Args:
        manifest: of the slides, checked: each name is there once, and fit for a file.
        policy, tiles_dir, slide_mpp, workers: as of `load_cohort`.

    Raises:
        ManifestError: lists every slide's problem.
    """
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        results = list(pool.map(lambda slide: _tile(slide, policy, tiles_dir, slide_mpp), manifest.slides))
    problems = [str(result) for result in results if isinstance(result, SlideError)]
    if problems:
        raise ManifestError(manifest.source, problems)
    entries, grids = zip(*(result for result in results if not isinstance(result, SlideError)))
    return Cohort(replace(manifest, slides=entries), grids)


def _tile(
    entry: SlideEntry, policy: TilingPolicy, tiles_dir: str | Path | None, slide_mpp: float | None
) -> tuple[SlideEntry, TileGrid] | SlideError:
    """The slide with the mpp to read it at, and its grid; an error is returned, so that all can be listed."""
    try:
        with Slide(entry.path, entry.mpp, entry.slide_id) as slide:
            try:
                own = slide.mpp
            except SlideError:
                if slide_mpp is None:
                    raise
                return _tile(replace(entry, mpp=slide_mpp), policy, tiles_dir, None)
            path = None if tiles_dir is None else Path(tiles_dir) / f"{entry.slide_id}.safetensors"
            grid = _kept_grid(path, slide, own, policy) if path else None
            if grid is None:
                grid = tile_slide(slide, policy)
                if path:
                    write_grid(grid, path)
            return entry, grid
    except SlideError as error:
        return error


def _kept_grid(path: Path, slide: Slide, mpp: float, policy: TilingPolicy) -> TileGrid | None:
    if not path.exists():
        return None
    grid = read_grid(path)
    if grid.source != "ds_wsi":
        _require_imported_fits(grid, policy, path)
        return grid
    same_slide = (grid.slide_width_px, grid.slide_height_px) == (slide.width_px, slide.height_px)
    if same_slide and grid.slide_mpp == mpp and grid.policy == policy:
        return grid
    logger.warning("%s: tiled with another policy or from another slide file, tiled anew", path)
    return None


def _require_imported_fits(grid: TileGrid, policy: TilingPolicy, path: Path) -> None:
    """An imported grid was chosen by its user: it is taken as it is, or refused, never replaced."""
    if grid.tile_size_px != policy.tile_size_px or abs(grid.mpp / policy.mpp - 1) > MPP_TOLERANCE:
        raise SlideError(
            f"the tile grid imported from {grid.source} must have the run's tiles, {policy.tile_size_px} px at "
            f"{policy.mpp:g} um/px, got {grid.tile_size_px} px at {grid.mpp:.4g} (slide {grid.slide_id}, {path}). "
            "HINT: give --tile_size_px and --mpp its values."
        )
