"""A cohort ready to train on: its manifest with splits, and the tile grid (or the file of features) of each slide."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ds_wsi.bags.features import FeatureFile
from ds_wsi.bags.joined import GridPart, JoinedGrid, parts_of, some_grid
from ds_wsi.bags.manifest import Manifest, ManifestError, SlideEntry, parse_manifest
from ds_wsi.bags.same_files import files_across_splits, fingerprint_of, require_files_apart, warn_of_shared_files
from ds_wsi.bags.shards import shard_order
from ds_wsi.bags.slide_policy import AS_THEY_ARE, SkippedSlide, SlidePolicy, tell_skipped, tell_tissue
from ds_wsi.bags.splits import assign_splits
from ds_wsi.bags.summary import log_cohort
from ds_wsi.bags.target_columns import ONE_CLASS, TargetColumns
from ds_wsi.runtime.fingerprint import Fingerprint
from ds_wsi.runtime.locks import lock_path, remove_dead_locks, shared_map
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.shards import ALONE, Shard
from ds_wsi.runtime.temporary import remove_left_behind
from ds_wsi.slides.coords import read_grid, read_slide_fingerprint, write_grid
from ds_wsi.slides.masks import MaskFile
from ds_wsi.slides.policy import AUTO, TilingPolicy
from ds_wsi.slides.slide import Slide, SlideError
from ds_wsi.slides.tiling import MPP_TOLERANCE, TileGrid, tile_slide


@dataclass(frozen=True)
class Cohort:
    """Slides and their grids, row by row; in a cohort of features (`load_feature_cohort`) their files.

    In a cohort of patients (`by_patient`) a row is a patient, whose grid joins those of the slides. `skipped` are
    the slides that were left out of both; `reader` is what reads the slides, see `Slide`.
    """

    manifest: Manifest
    grids: tuple[TileGrid, ...] | tuple[FeatureFile, ...] | tuple[JoinedGrid, ...]
    skipped: tuple[SkippedSlide, ...] = ()
    reader: str = AUTO

    def rows(self, split: str) -> tuple[int, ...]:
        """The rows of one split."""
        return self._rows_of.get(split, ())

    @cached_property  # every step asks for it, as for the rows
    def lengths(self) -> tuple[int, ...]:
        """Tiles of each slide."""
        return tuple(len(grid) for grid in self.grids)

    @cached_property
    def _rows_of(self) -> dict[str | None, tuple[int, ...]]:
        rows: dict[str | None, list[int]] = {}
        for row, slide in enumerate(self.manifest.slides):
            rows.setdefault(slide.split, []).append(row)
        return {split: tuple(numbers) for split, numbers in rows.items()}

    @property
    def in_dim(self) -> int | None:
        """The width of the features; None in a cohort of slides."""
        first = some_grid(self.grids)
        return first.width if isinstance(first, FeatureFile) else None

    @property
    def n_slides(self) -> int:
        """How many slides there are."""
        return sum(len(slide.slides) for slide in self.manifest.slides)

    def parts(self, rows: Sequence[int] | None = None) -> tuple[GridPart, ...]:
        """The slides of these rows, or of all, each with its grid or file; a patient's together."""
        chosen = range(len(self.grids)) if rows is None else rows
        return tuple(part for row in chosen for part in parts_of(self.manifest.slides[row], self.grids[row], row))

    @property
    def tile_grids(self) -> tuple[TileGrid, ...]:
        """The grids of a cohort of slides, in the order of `parts`."""
        parts = self.parts()
        grids = tuple(part.grid for part in parts if isinstance(part.grid, TileGrid))
        assert len(grids) == len(parts)
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
    write_grids: bool = True,
    labels: str = "required",
    columns: TargetColumns = ONE_CLASS,
    choose: Callable[[Manifest], Manifest] | None = None,
    slides: SlidePolicy = AS_THEY_ARE,
    on_slide: Callable[[int], None] = lambda n_slides: None,
    shard: Shard = ALONE,
) -> Cohort:
    """Read and check a whole cohort before anything is trained on it: the table first, then the slides.

    Args:
        manifest_path: the table, see `read_manifest`.
        policy: how slides are tiled.
        tiles_dir: grids are kept there, one file per slide, and read again where policy and slide still match: a
            slide is known by its content (`slide_fingerprint`).
        classes: class names in the order of the logits.
        slide_mpp: um/px of the slides for which neither manifest nor file gives a plausible one.
        seed: the seed that splits are drawn by, where the manifest has none.
        workers: threads that tile.
        need_splits: whether splits are drawn where the manifest has none.
        write_grids: False reads the grids of `tiles_dir` and writes none.
        labels, columns: see `parse_manifest`.
        choose: takes the slides that are wanted, before any is opened.
        slides: how they are opened: masks from outside, and whether bad ones are left out.
        on_slide: called with the number of slides whenever one is done.
        shard: this process, where several tile into `tiles_dir`.

    Raises:
        ManifestError: lists every problem of the manifest, before a slide is opened; else every problem of the slides.
    """
    need_slides = not slides.skip_bad_slides  # a missing file is a bad slide like another, found when it is opened
    manifest, problems = parse_manifest(manifest_path, classes, labels=labels, need_slides=need_slides, columns=columns)
    if problems:
        raise ManifestError(manifest.source, problems)
    manifest = manifest if choose is None else choose(manifest)
    cohort = tile_manifest(
        *(manifest, policy),
        tiles_dir=tiles_dir,
        slide_mpp=slide_mpp,
        workers=workers,
        write_grids=write_grids,
        slides=slides,
        on_slide=on_slide,
        shard=shard,
    )
    if need_splits:
        cohort = replace(cohort, manifest=assign_splits(cohort.manifest, seed=seed))
        require_files_apart(cohort.manifest)
    log_cohort(cohort.manifest, cohort.lengths)
    return cohort


def tile_manifest(
    manifest: Manifest,
    policy: TilingPolicy,
    *,
    tiles_dir: str | Path | None = None,
    slide_mpp: float | None = None,
    workers: int = 1,
    write_grids: bool = True,
    slides: SlidePolicy = AS_THEY_ARE,
    on_slide: Callable[[int], None] = lambda n_slides: None,
    shard: Shard = ALONE,
) -> Cohort:
    """Open and tile every slide of a manifest; its splits stay as they are.

    Args:
        manifest: the slides, checked: each name is there once, and fit for a file.
        policy, tiles_dir, slide_mpp, workers, write_grids, slides, on_slide, shard: see `load_cohort`.

    Raises:
        ManifestError: lists every slide's problem, and the files that are on both sides of a split.
    """
    chosen = slides.wanted(manifest.slides)
    if tiles_dir is not None and write_grids:
        remove_left_behind(Path(tiles_dir))

    def tile(row: int, only_kept: bool = False) -> _Tiled | None:
        result = _tile(chosen[row], policy, tiles_dir, slide_mpp, prints[row], write_grids, slides, only_kept)
        if result is not None:
            on_slide(len(chosen))
        return result

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        prints = list(pool.map(fingerprint_of, chosen))
        problems = files_across_splits(chosen, prints)
        warn_of_shared_files(chosen, prints)
        if masks := slides.masks_problem(chosen):
            problems.append(masks)
    order = shard_order([0 if fingerprint is None else fingerprint.n_bytes for fingerprint in prints], shard)
    folder = Path(tiles_dir) if tiles_dir is not None and write_grids else None
    results = _tiled_once(tile, chosen, folder, workers, order)
    skipped, bad = slides.leave_out(chosen, results)
    problems += bad
    if problems:
        raise ManifestError(manifest.source, problems)
    tiled = [result for result in results if not isinstance(result, SlideError)]
    _tell_kept(tiled, tiles_dir)
    entries, grids = tuple(slide.entry for slide in tiled), tuple(slide.grid for slide in tiled)
    if slides.skipped is None:  # else another process has told it
        tell_skipped(skipped, len(manifest.slides))
        tell_tissue(grids, with_masks=bool(slides.tissue_masks))
    return Cohort(replace(manifest, slides=entries), grids, skipped, slides.reader)


def _tiled_once(
    tile: "Callable[..., _Tiled | None]",
    entries: Sequence[SlideEntry],
    folder: Path | None,
    workers: int,
    order: Sequence[int],
) -> "list[_Tiled]":
    """Each slide tiled; of several processes that keep their grids in one folder by one of them alone.

    What is kept needs no lock, so that its folder may be one that cannot be written to.
    """
    rows = range(len(entries))
    kept: dict[int, _Tiled | None] = dict.fromkeys(rows)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        if folder is None:
            return [result for result in pool.map(tile, rows) if result is not None]
        there = [row for row in rows if os.path.lexists(folder / f"{entries[row].slide_id}.safetensors")]
        kept.update(zip(there, pool.map(lambda row: tile(row, only_kept=True), there), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    left = [row for row in order if kept[row] is None]
    lock_of = lambda row: lock_path(folder, entries[row].slide_id)  # noqa: E731
    kept.update(zip(left, shared_map(left, lock_of, tile, workers), strict=True))
    if os.access(folder, os.W_OK):
        remove_dead_locks(folder)
    return [result for result in kept.values() if result is not None]


class _TiledSlide(NamedTuple):
    """The slide with the mpp to read it at, its grid, and what became of the grid that was kept."""

    entry: SlideEntry
    grid: TileGrid
    kept: str


_Tiled = _TiledSlide | SlideError

# What becomes of the grid's file in `tiles_dir`.
_NEW, _TAKEN, _TAKEN_BY_NAME, _REPLACED = "new", "taken", "taken by name", "replaced"


def _tell_kept(slides: Sequence[_TiledSlide], tiles_dir: str | Path | None) -> None:
    """One line per kind, with its count."""
    for kind, words in (
        (_REPLACED, "grids were of another policy, mask or slide file: these slides are tiled anew"),
        (
            _TAKEN_BY_NAME,
            "grids are of an earlier version, which recorded no fingerprint: they are taken by the slide's size and "
            "resolution. HINT: delete those whose slide was replaced since",
        ),
    ):
        ids = [slide.entry.slide_id for slide in slides if slide.kept == kind]
        if ids:
            shown = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
            logger.warning("%s: %d of %d %s (%s)", tiles_dir, len(ids), len(slides), words, shown)


def _tile(
    entry: SlideEntry,
    policy: TilingPolicy,
    tiles_dir: str | Path | None,
    slide_mpp: float | None,
    print_of_file: Fingerprint | None,
    write_grids: bool,
    slides: SlidePolicy,
    only_kept: bool,
) -> _Tiled | None:
    """The tiled slide, None where only a grid that is kept is wanted; errors are returned, so that all are listed."""
    try:
        mask = slides.mask_of(entry)
        with Slide(entry.path, entry.mpp, entry.slide_id, fallback_mpp=slide_mpp, reader=slides.reader) as slide:
            mpp = slide.mpp
            if slide.uses_fallback_mpp:
                entry = replace(entry, mpp=mpp)
            path = None if tiles_dir is None else Path(tiles_dir) / f"{entry.slide_id}.safetensors"
            grid, kept = _kept_grid(path, slide, mpp, policy, print_of_file, mask) if path else (None, _NEW)
            if grid is None and only_kept:
                return None
            if grid is None:
                grid = tile_slide(slide, policy, mask)
                if path and write_grids:
                    write_grid(grid, path, print_of_file)
            slide.require_shrink(grid.policy.shrink, grid.level, grid.read_size_px, grid.tile_size_px)
            return _TiledSlide(entry, grid, kept)
    except SlideError as error:
        return error


def _kept_grid(
    path: Path, slide: Slide, mpp: float, policy: TilingPolicy, print_of_file: Fingerprint | None, mask: MaskFile | None
) -> tuple[TileGrid | None, str]:
    """The grid of the file at `path` where it is this slide's, and what becomes of the file."""
    if not os.path.lexists(path):
        return None, _NEW
    grid, of_slide = read_grid(path), read_slide_fingerprint(path)
    same_file = of_slide is None or of_slide == print_of_file
    same_size = (grid.slide_width_px, grid.slide_height_px) == (slide.width_px, slide.height_px)
    if grid.source != "ds_wsi":
        _require_imported_fits(grid, policy, path)
        _require_imported_of(grid, slide, path, same_size and same_file)
        # Coordinates alone were imported: how their tiles are shrunk is the run's.
        grid = replace(grid, policy=replace(grid.policy, shrink=policy.shrink))
        return grid, _TAKEN if of_slide else _TAKEN_BY_NAME
    same_mask = (grid.tissue.mask if grid.tissue else "") == (mask.name if mask else "")
    if same_size and same_file and same_mask and grid.slide_mpp == mpp and grid.policy == policy:
        return grid, _TAKEN if of_slide else _TAKEN_BY_NAME
    return None, _REPLACED


def _require_imported_fits(grid: TileGrid, policy: TilingPolicy, path: Path) -> None:
    """An imported grid was chosen by its user: it is taken as it is, or refused, never replaced."""
    if grid.tile_size_px != policy.tile_size_px or abs(grid.mpp / policy.mpp - 1) > MPP_TOLERANCE:
        raise SlideError(
            f"the tile grid imported from {grid.source} must have the run's tiles, {policy.tile_size_px} px at "
            f"{policy.mpp:g} um/px, got {grid.tile_size_px} px at {grid.mpp:.4g} (slide {grid.slide_id}, {path}). "
            "HINT: give --tile_size_px and --mpp its values."
        )


def _require_imported_of(grid: TileGrid, slide: Slide, path: Path, is_same: bool) -> None:
    if not is_same:
        raise SlideError(
            f"the tile grid imported from {grid.source} must be of the slide's present file, {slide.width_px} x "
            f"{slide.height_px} px, got one of another file, {grid.slide_width_px} x {grid.slide_height_px} px "
            f"(slide {grid.slide_id}, {slide.path}, {path}). HINT: import it again, or delete {path.name}."
        )
