"""Bags of several magnifications: the tiles of each one's grid, one grid after the other, with one encoder."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ds_wsi.bags.cohort import Cohort
from ds_wsi.bags.joined import GridPart, JoinedGrid
from ds_wsi.bags.manifest import Manifest
from ds_wsi.slides.policy import TilingPolicy

Tile = Callable[[Manifest, TilingPolicy, Path | None], Cohort]


def scale_folder(mpp: float) -> str:
    """The folder, below that of the finest magnification, which holds the files of another."""
    return f"mpp_{mpp:g}"


def tile_scales(first: Cohort, tilings: Sequence[TilingPolicy], tiles_dir: str | Path | None, tile: Tile) -> Cohort:
    """A cohort that is tiled at the first of these policies, tiled at the others too.

    Args:
        first: the slides with their grids of the finest magnification.
        tilings: one per magnification, the finest first.
        tiles_dir: the folder of its grids; those of others lie below it, see `scale_folder`.
        tile: tiles slides by a policy, with a folder of their grids.
    """
    cohorts = [first]
    for tiling in tilings[1:]:
        folder = None if tiles_dir is None else Path(tiles_dir) / scale_folder(tiling.mpp)
        cohorts.append(tile(cohorts[-1].manifest, tiling, folder))
    return with_scales(cohorts)


def feature_scales(
    load: Callable[..., Cohort], features_dir: str | Path, mpps: Sequence[float], in_dim: int | None = None
) -> Cohort:
    """A cohort of features at several magnifications: a file per slide and magnification.

    Args:
        load: `load_feature_cohort` of all but its folder and width.
        features_dir: the folder of the finest; those of others are below it, see `scale_folder`.
        mpps: all magnifications, the finest first; empty: one.
        in_dim: the width that the features must have; by default that of most of the finest's.
    """
    first = load(features_dir, in_dim=in_dim)
    folders = [Path(features_dir) / scale_folder(mpp) for mpp in mpps[1:]]
    return with_scales([first, *(load(folder, in_dim=first.in_dim) for folder in folders)])


def with_scales(cohorts: Sequence[Cohort]) -> Cohort:
    """Cohorts of the same slides at several magnifications as one: a slide's tiles are those of each, in their order.

    A slide that is left out of one is left out of all.
    """
    if len(cohorts) == 1:
        return cohorts[0]
    by_id: list[dict[str, Any]] = [
        dict(zip((slide.slide_id for slide in cohort.manifest.slides), cohort.grids, strict=True)) for cohort in cohorts
    ]
    slides = tuple(slide for slide in cohorts[0].manifest.slides if all(slide.slide_id in grids for grids in by_id))
    joined = tuple(
        JoinedGrid(tuple(GridPart(slide, grids[slide.slide_id], number, scale) for scale, grids in enumerate(by_id)))
        for number, slide in enumerate(slides)
    )
    skipped = {one.slide_id: one for cohort in cohorts for one in cohort.skipped}
    manifest = replace(cohorts[0].manifest, slides=slides)
    return replace(cohorts[0], manifest=manifest, grids=joined, skipped=tuple(skipped.values()))
