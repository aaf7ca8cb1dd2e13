"""`ds-wsi tile`: tile coordinates, from and to other projects' files, and packed tiles."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from ds_wsi.commands.cohort import TILING_OPTIONS, add_cohort_options, classes_of
from ds_wsi.commands.parser import add_command
from ds_wsi.slides.tiling import TilingPolicy
from ds_wsi.training.options import spellings

if TYPE_CHECKING:
    from ds_wsi.bags.cohort import Cohort


def add_tile(subparsers: argparse._SubParsersAction) -> None:
    """The options of `ds-wsi tile`."""
    parser = add_command(subparsers, "tile", run_tile)
    add_cohort_options(parser)
    for entry in fields(TilingPolicy):
        if entry.name in TILING_OPTIONS:
            kind = type(entry.default)
            parser.add_argument(
                *spellings(entry.name), type=kind, default=entry.default, help=f"(default: {entry.default})"
            )
    parser.add_argument(*spellings("output_dir"), required=True, help="one file a slide is written there")
    parser.add_argument("--export", choices=("clam", "trident"), help="write that project's h5 files beside ours")
    for project in ("clam", "trident"):
        parser.add_argument(
            *spellings(f"import_{project}"), metavar="DIR", help=f"take coordinates from {project.upper()}'s h5 files"
        )
    parser.add_argument("--store", metavar="DIR", help="also pack the tiles there, for training with --tile_store DIR")
    parser.add_argument(*spellings("jpeg_quality"), type=int, default=90, help="of packed tiles (default: 90)")
    parser.add_argument(
        "--verify", action="store_true", help="check the tiles that are packed, pack damaged slides anew"
    )
    parser.add_argument("--workers", type=int, default=1, help="threads")


def run_tile(options: argparse.Namespace) -> None:
    """`ds-wsi tile`."""
    from ds_wsi.bags.cohort import load_cohort
    from ds_wsi.slides.coords import export_clam, export_trident

    policy = TilingPolicy(
        tile_size_px=options.tile_size_px, mpp=options.mpp, min_tissue_fraction=options.min_tissue_fraction
    )
    if options.import_clam or options.import_trident:
        _import_grids(options)
        return
    cohort = load_cohort(
        options.manifest,
        policy,
        tiles_dir=options.output_dir,
        classes=classes_of(options),
        slide_mpp=options.slide_mpp,
        workers=options.workers,
        need_splits=False,
    )
    exporters = {"clam": export_clam, "trident": export_trident}
    for grid in cohort.tile_grids:
        print(f"{grid.slide_id}\t{len(grid)} tiles")
        if options.export:
            suffix = "_patches.h5" if options.export == "trident" else ".h5"
            exporters[options.export](
                grid, Path(options.output_dir) / options.export / "patches" / f"{grid.slide_id}{suffix}"
            )
    if options.store:
        _pack(cohort, options)


def _pack(cohort: "Cohort", options: argparse.Namespace) -> None:
    from ds_wsi.bags.packing import pack_cohort

    packed = pack_cohort(
        cohort, options.store, quality=options.jpeg_quality, workers=options.workers, verify=options.verify
    )
    n_bytes = sum(slide.path.stat().st_size for slide in packed)
    print(
        f"{options.store}\t{sum(cohort.lengths)} tiles of {len(packed)} slides, {n_bytes / 2**20:.1f} MiB, "
        f"{sum(slide.written for slide in packed)} slides packed now, "
        f"{sum(slide.n_failed for slide in packed)} tiles unreadable"
    )


def _import_grids(options: argparse.Namespace) -> None:
    """Write our grids from another project's: every slide's file must be there, all that is wrong is listed."""
    from ds_wsi.bags.manifest import ManifestError, read_manifest
    from ds_wsi.slides.coords import import_clam, import_trident, write_grid
    from ds_wsi.slides.slide import Slide, SlideError

    importer, folder, suffix = (
        (import_clam, options.import_clam, ".h5")
        if options.import_clam
        else (import_trident, options.import_trident, "_patches.h5")
    )
    manifest = read_manifest(options.manifest, classes_of(options))
    grids, problems = [], []
    for entry in manifest.slides:
        try:
            with Slide(entry.path, entry.mpp or options.slide_mpp, entry.slide_id) as slide:
                grids.append(importer(Path(folder) / f"{entry.slide_id}{suffix}", slide))
        except SlideError as error:
            problems.append(str(error))
    if problems:
        raise ManifestError(manifest.source, problems)
    for grid in grids:
        write_grid(grid, Path(options.output_dir) / f"{grid.slide_id}.safetensors")
        print(f"{grid.slide_id}\t{len(grid)} tiles from {grid.source}")
