"""`ds-wsi tile`: tile coordinates, from and to other projects' files, tissue masks, and packed tiles."""

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from ds_wsi.commands.cohort import (
    TILING_OPTIONS,
    add_cohort_options,
    classes_of,
    labels_of,
    shard_from,
    slide_policy_of,
    tell_left_out,
    tiling_of,
)
from ds_wsi.commands.parser import add_command
from ds_wsi.runtime.bounds import MOST_WORKERS, whole
from ds_wsi.runtime.locks import in_turn, lock_path, remove_dead_locks, shared_map
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.progress import Progress, duration
from ds_wsi.runtime.streams import show
from ds_wsi.runtime.words import counted
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.training.options import add_shared_options, spellings

if TYPE_CHECKING:
    from ds_wsi.bags.cohort import Cohort
    from ds_wsi.bags.slide_policy import SlidePolicy
    from ds_wsi.runtime.shards import Shard
    from ds_wsi.slides.tiling import TileGrid

SUMMARY, SUMMARY_COLUMNS = "tile_summary.csv", ("slide_id", "n_tiles", "tissue_share", "level", "mpp")
STORE_SUMMARY, STORE_COLUMNS = "store_summary.csv", ("slide_id", "n_tiles", "n_unreadable", "n_bytes")


def add_tile(subparsers: argparse._SubParsersAction) -> None:
    """The options of `ds-wsi tile`."""
    parser = add_command(subparsers, "tile", run_tile)
    add_cohort_options(parser)
    add_shared_options(parser, TILING_OPTIONS)
    parser.add_argument(*spellings("output_dir"), required=True, help="folder in which one file per slide is written")
    parser.add_argument("--export", choices=("clam", "trident"), help="write that project's h5 files beside ours")
    parser.add_argument(
        *spellings("export_masks"), metavar="DIR", help="write each slide's tissue there, as GeoJSON that QuPath opens"
    )
    for project in ("clam", "trident"):
        parser.add_argument(
            *spellings(f"import_{project}"), metavar="DIR", help=f"take coordinates from {project.upper()}'s h5 files"
        )
    parser.add_argument("--store", metavar="DIR", help="also pack the tiles there, for training with --tile_store DIR")
    parser.add_argument(
        *spellings("jpeg_quality"),
        type=whole(1, 100),
        default=90,
        help="JPEG quality of packed tiles, 1 to 100 (default: 90)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="check the tiles that are packed, pack damaged slides anew"
    )
    parser.add_argument(
        "--workers", type=whole(1, MOST_WORKERS), default=1, help="number of threads, a slide each (default: 1)"
    )


def run_tile(options: argparse.Namespace) -> None:
    """`ds-wsi tile`."""
    from ds_wsi.bags.cohort import load_cohort
    from ds_wsi.bags.shards import SummaryFile

    policy, shard = tiling_of(options, TilingPolicy()), shard_from(options)
    slides = slide_policy_of(options)
    if options.import_clam or options.import_trident:
        if shard.index == 0:  # it takes seconds, and lists all problems at once
            _import_grids(options)
        return
    if options.export_masks:
        _require_apart(options)
    summary = SummaryFile(Path(options.output_dir) / SUMMARY, SUMMARY_COLUMNS)
    with Progress("tiling", "slide") as progress:
        cohort = load_cohort(
            options.manifest,
            policy,
            tiles_dir=options.output_dir,
            classes=classes_of(options),
            slide_mpp=options.slide_mpp,
            workers=options.workers,
            need_splits=False,
            labels=labels_of(options),
            slides=slides,
            on_slide=progress.step,
            shard=shard,
        )
    # Of several processes the one that finds all done first tells it.
    with in_turn(lock_path(Path(options.output_dir), "/summary")):  # no slide's name
        rows = [_summary_row(grid) for grid in cohort.tile_grids]
        is_first = shard.is_alone or not summary.holds(rows)
        if options.export:
            folder = _export(cohort, options, only_missing=not is_first)
        summary.write(rows)
        if is_first:
            _tell(cohort, options, progress.seconds)
        if is_first and options.export:
            words = f"coordinates of {counted(len(cohort.grids), 'slide')} as {options.export.upper()} has them"
            show(f"{folder}\t{words}")
    if options.export_masks:
        _export_masks(cohort, options, policy, slides, shard)
    if options.store:
        _pack(cohort, options, shard)
    tell_left_out(cohort, options.output_dir)


def _tell(cohort: "Cohort", options: argparse.Namespace, seconds: float) -> None:
    for grid in cohort.tile_grids:
        share = "" if grid.tissue is None else f"\t{grid.tissue.share:.0%} tissue"
        show(f"{grid.slide_id}\t{counted(len(grid), 'tile')}{share}")
    show(f"{options.output_dir}\t{_summary(cohort)}, {duration(seconds)}")


def _summary_row(grid: "TileGrid") -> tuple[object, ...]:
    share = "" if grid.tissue is None else repr(grid.tissue.share)
    return grid.slide_id, len(grid), share, grid.level, repr(grid.mpp)


def _summary(cohort: "Cohort") -> str:
    grids = cohort.tile_grids
    words = [counted(len(grids), "slide"), f"{counted(sum(cohort.lengths), 'tile')} of {grids[0].tile_size_px} px"]
    tissues = [grid.tissue for grid in grids if grid.tissue is not None]
    if tissues:
        kept, whole = sum(cohort.lengths), sum(tissue.n_whole for tissue in tissues)
        words[-1] += f" of {whole} ({kept / whole:.0%} kept)" if len(tissues) == len(grids) else ""
        words.append(f"{sum(tissue.share for tissue in tissues) / len(tissues):.0%} of the area is tissue")
    levels = Counter(f"level {grid.level}" + _resampled(grid.read_size_px, grid.tile_size_px) for grid in grids)
    shown = "; ".join(
        f"{words} ({count} slides)" if len(levels) > 1 else words for words, count in levels.most_common(4)
    )
    low, high = min(grid.mpp for grid in grids), max(grid.mpp for grid in grids)
    mpp = f"{low:.4g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.4g} to {high:.4g}"
    return ", ".join([*words, f"read at {shown}, {mpp} um/px"])


def _resampled(read_size_px: int, tile_size_px: int) -> str:
    return "" if read_size_px == tile_size_px else f" ({read_size_px} px resampled)"


def _export(cohort: "Cohort", options: argparse.Namespace, only_missing: bool) -> Path:
    """Write another project's files; the folder of them."""
    from ds_wsi.slides.coords import export_clam, export_trident

    exporter, suffix = (export_clam, ".h5") if options.export == "clam" else (export_trident, "_patches.h5")
    folder = Path(options.output_dir) / options.export / "patches"
    for grid in cohort.tile_grids:
        path = folder / f"{grid.slide_id}{suffix}"
        if not (only_missing and path.exists()):
            exporter(grid, path)
    return folder


def _require_apart(options: argparse.Namespace) -> None:
    """Masks that were corrected by hand must not be written over by ours."""
    if options.tissue_masks and Path(options.tissue_masks).resolve() == Path(options.export_masks).resolve():
        raise ValueError(
            f"--export_masks must be another folder than --tissue_masks, got {options.export_masks} for both. HINT: "
            "give another folder; masks that were corrected are kept apart."
        )


def _export_masks(
    cohort: "Cohort", options: argparse.Namespace, policy: TilingPolicy, slides: "SlidePolicy", shard: "Shard"
) -> None:
    """Write the masks; a file that is there already and is another stays: it may have been corrected."""
    from ds_wsi.bags.shards import shard_order
    from ds_wsi.slides.masks import write_mask
    from ds_wsi.slides.slide import Slide
    from ds_wsi.slides.tiling import find_tissue

    folder = Path(options.export_masks)
    folder.mkdir(parents=True, exist_ok=True)
    entries = cohort.manifest.slides
    paths = [folder / f"{entry.slide_id}.geojson" for entry in entries]
    left = [entry.slide_id for entry, path in zip(entries, paths, strict=True) if path.exists()]

    def write(row: int) -> None:
        entry = entries[row]
        if not paths[row].exists():
            with Slide(entry.path, entry.mpp, entry.slide_id, reader=slides.reader) as slide:
                tissue = find_tissue(slide, policy, slides.mask_of(entry))
                write_mask(paths[row], tissue.mask, tissue.downsample, slide, options.masks_in_bounds)
        progress.step()

    with Progress("masks", "slide", len(cohort.grids)) as progress:
        order = shard_order(cohort.lengths, shard)
        shared_map(order, lambda row: lock_path(folder, entries[row].slide_id), write, 1)
    remove_dead_locks(folder)
    show(f"{folder}\t{len(cohort.grids) - len(left)} masks written, as GeoJSON for QuPath")
    if left:
        shown = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
        logger.warning(
            "%d masks were there already and were left as they are (%s). HINT: delete those to be written anew",
            *(len(left), shown),
        )


def _pack(cohort: "Cohort", options: argparse.Namespace, shard: "Shard") -> None:
    from ds_wsi.bags.packing import pack_cohort
    from ds_wsi.bags.shards import SummaryFile

    summary = SummaryFile(Path(options.store) / STORE_SUMMARY, STORE_COLUMNS)
    with Progress("packing", "slide", len(cohort.grids)) as progress:
        packed = pack_cohort(
            cohort,
            options.store,
            quality=options.jpeg_quality,
            workers=options.workers,
            verify=options.verify,
            on_slide=progress.step,
            shard=shard,
        )
    sizes = [slide.path.stat().st_size for slide in packed]
    summary.write(
        [
            (grid.slide_id, len(grid), slide.n_failed, size)
            for grid, slide, size in zip(cohort.tile_grids, packed, sizes, strict=True)
        ]
    )
    show(
        f"{options.store}\t{counted(sum(cohort.lengths), 'tile')} of {counted(len(packed), 'slide')}, "
        f"{sum(sizes) / 2**20:.1f} MiB, {sum(slide.written for slide in packed)} slides packed now, "
        f"{sum(slide.n_failed for slide in packed)} tiles unreadable, {duration(progress.seconds)}"
    )


def _import_grids(options: argparse.Namespace) -> None:
    """Write our grids from another project's: every slide's file must be there, all that is wrong is listed."""
    from ds_wsi.bags.manifest import ManifestError, parse_manifest
    from ds_wsi.bags.summary import log_cohort
    from ds_wsi.slides.coords import import_clam, import_trident, read_grid, write_grid
    from ds_wsi.slides.fingerprint import slide_fingerprint
    from ds_wsi.slides.slide import Slide, SlideError

    _require_imports(options)
    importer, folder, suffix = (
        (import_clam, options.import_clam, ".h5")
        if options.import_clam
        else (import_trident, options.import_trident, "_patches.h5")
    )
    manifest, problems = parse_manifest(options.manifest, classes_of(options), labels=labels_of(options))
    if problems:
        raise ManifestError(manifest.source, problems)
    grids = []
    for entry in manifest.slides:
        try:
            grid_path = Path(options.output_dir) / f"{entry.slide_id}.safetensors"
            if os.path.lexists(grid_path):
                read_grid(grid_path)  # what is no grid is not written over
            with Slide(
                entry.path, entry.mpp, entry.slide_id, fallback_mpp=options.slide_mpp, reader=options.slide_reader
            ) as slide:
                grids.append(importer(Path(folder) / f"{entry.slide_id}{suffix}", slide))
        except SlideError as error:
            problems.append(str(error))
    if problems:
        raise ManifestError(manifest.source, problems)
    log_cohort(manifest, [len(grid) for grid in grids])
    paths = {entry.slide_id: entry.path for entry in manifest.slides}
    for grid in grids:
        path = Path(options.output_dir) / f"{grid.slide_id}.safetensors"
        write_grid(grid, path, slide_fingerprint(paths[grid.slide_id]))
    for grid in grids:
        show(f"{grid.slide_id}\t{counted(len(grid), 'tile')} from {grid.source}")
    show(f"{options.output_dir}\t{len(grids)} grids, {sum(map(len, grids))} tiles imported from {folder}")


def _require_imports(options: argparse.Namespace) -> None:
    """Refuse what has no effect on coordinates that another project chose."""
    given = [
        name
        for name in ("tissue_masks", "skip_bad_slides", "export", "export_masks", "store")
        if getattr(options, name)
    ]
    if options.import_clam and options.import_trident:
        given.append("import_trident")
    if given:
        raise ValueError(
            f"--{given[0]} must not be given with --import_{'clam' if options.import_clam else 'trident'}, which takes "
            "coordinates as they are. HINT: leave it out; `ds-wsi tile` with the imported folder as --output_dir, and "
            "the tile size and mpp of its grids, goes on from them."
        )
