"""Heat maps of predictions: one per slide, of a patient's bag too."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ds_wsi.bags.cohort import Cohort
from ds_wsi.bags.features import FeatureFile, read_places
from ds_wsi.bags.joined import GridPart, JoinedGrid
from ds_wsi.bags.scales import scale_folder
from ds_wsi.evaluation.heatmap import draw_attention, heat_map_of, percentile_rank
from ds_wsi.evaluation.predict import SlidePrediction
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.progress import Progress
from ds_wsi.runtime.words import counted
from ds_wsi.slides.slide import Slide, SlideError
from ds_wsi.slides.tiling import TileGrid

NO_ATTENTION = "the aggregator has no attention"
OVERVIEW_SIDE_PX = 900  # of the thumbnails under the heat maps


class SlideMap(NamedTuple):
    """A slide's heat map: its file, or the reason for which there is none, of which `NO_ATTENTION` is one."""

    slide_id: str
    result: Path | str


class _Shown(NamedTuple):
    """What is drawn of a slide: its tiles' rows in its grid, their attention, and their ranks in the bag."""

    part: GridPart
    rows: np.ndarray
    attention: np.ndarray
    ranks: np.ndarray


def draw_heatmaps(
    directory: Path,
    cohort: Cohort,
    predictions: Sequence[SlidePrediction],
    *,
    shown: bool = True,
    made_of: Callable[[int], str] = lambda row: "",
) -> list[tuple[str, Path]]:
    """Draw each slide's attention over its thumbnail; a heat map that is there and is known by `made_of` is kept.

    An aggregator without attention draws none, nor do features without coordinates or without their slide: each reason
    is logged once.
    """
    drawn: list[tuple[str, Path]] = []
    left_out: dict[str, list[str]] = {}
    for prediction in Progress("heat maps", "slide", len(predictions), shown=shown).over(predictions):
        for slide_id, result in draw_heatmap(directory, cohort, prediction, made_of(prediction.slide)):
            if result == NO_ATTENTION:
                logger.info("no heat maps: %s", NO_ATTENTION)
                return []
            if isinstance(result, Path):
                drawn.append((slide_id, result))
            else:
                left_out.setdefault(result, []).append(slide_id)
    tell_not_drawn(left_out)
    return drawn


def tell_not_drawn(left_out: Mapping[str, Sequence[str]]) -> None:
    """One line per reason, with its slides."""
    for reason, slide_ids in left_out.items():
        names = ", ".join(slide_ids[:3]) + (", ..." if len(slide_ids) > 3 else "")
        logger.info("no heat map of %s (%s): %s", counted(len(slide_ids), "slide"), names, reason)


def map_path(directory: Path, part: GridPart) -> Path:
    """Where a slide's heat map lies; that of a coarser magnification in a folder of its own."""
    return (directory / _scale_of(part) if part.scale else directory) / f"{part.entry.slide_id}.png"


def _map_name(part: GridPart) -> str:
    """What a heat map is called: by its slide, and by its magnification where that is not the finest."""
    return f"{part.entry.slide_id} ({_scale_of(part)})" if part.scale else part.entry.slide_id


def _scale_of(part: GridPart) -> str:
    """The magnification of a part, as folders are named by it: mpp_2."""
    return part.grid.path.parent.name if isinstance(part.grid, FeatureFile) else scale_folder(part.grid.policy.mpp)


def draw_heatmap(directory: Path, cohort: Cohort, prediction: SlidePrediction, made_of: str = "") -> list[SlideMap]:
    """Draw the attention of a prediction, one heat map per slide.

    Of a bag of several slides, or magnifications, the colours are ranks among all its tiles: they compare these.
    """
    row = prediction.slide
    if prediction.attention is None:
        return [SlideMap(_map_name(part), NO_ATTENTION) for part in cohort.parts([row])]
    label = cohort.manifest.label_name(cohort.manifest.slides[row])
    maps = []
    for shown in _shown(cohort, prediction):
        slide_id, path = _map_name(shown.part), map_path(directory, shown.part)
        if made_of and heat_map_of(path) == made_of:
            maps.append(SlideMap(slide_id, path))
            continue
        title = f"{slide_id} (label: {label})" if label else slide_id
        joined = isinstance(cohort.grids[row], JoinedGrid)
        maps.append(SlideMap(slide_id, _draw(shown, path, title, made_of, cohort.reader, joined=joined)))
    return maps


def _shown(cohort: Cohort, prediction: SlidePrediction) -> list[_Shown]:
    """The slides of a prediction, each with its share of the attention."""
    assert prediction.attention is not None
    row, attention, kept = prediction.slide, prediction.attention.numpy(), prediction.kept
    grid = cohort.grids[row]
    parts = cohort.parts([row])
    counts = grid.counts(kept) if isinstance(grid, JoinedGrid) else [len(kept)]
    bounds = grid.bounds if isinstance(grid, JoinedGrid) else (0,)
    ranks = percentile_rank(attention.astype(np.float64)) if np.isfinite(attention).all() else attention
    shown, start = [], 0
    for part, first, count in zip(parts, bounds, counts, strict=False):
        of_part = slice(start, start + count)
        shown.append(_Shown(part, kept[of_part].numpy() - first, attention[of_part], ranks[of_part]))
        start += count
    return shown


def _draw(shown: _Shown, path: Path, title: str, made_of: str, reader: str, *, joined: bool) -> Path | str:
    """Draw a slide's map; its file, or why there is none."""
    if not len(shown.rows):
        return "none of its tiles could be read"
    grid = shown.part.grid
    if isinstance(grid, TileGrid):
        coords = grid.coords[shown.rows]
        _draw_over(shown, coords, grid.tile_size_level0_px, path, title, made_of, reader, joined=joined)
        return path
    return _draw_features(shown, grid, path, title, made_of, reader, joined=joined) or path


def _draw_over(
    shown: _Shown,
    coords: np.ndarray,
    tile_size_level0_px: float,
    path: Path,
    title: str,
    made_of: str,
    reader: str,
    *,
    joined: bool,
) -> None:
    entry = shown.part.entry
    with Slide(entry.path, entry.mpp, entry.slide_id, reader=reader) as slide:
        downsample = max(1.0, max(slide.width_px, slide.height_px) / OVERVIEW_SIDE_PX)
        thumbnail, downsample = slide.read_overview_downsampled(downsample)
    ranks = shown.ranks if joined else None
    draw_attention(
        *(thumbnail, coords, tile_size_level0_px, shown.attention, downsample, path, title, made_of), ranks=ranks
    )


def _draw_features(
    shown: _Shown, file: FeatureFile, path: Path, title: str, made_of: str, reader: str, *, joined: bool
) -> str | None:
    """Draw the attention over features on disk, or return why it cannot be drawn."""
    if not shown.part.entry.path.is_file():
        return "the manifest names no slide file that is there"
    places = read_places(file.path)
    if places is None:
        return (
            "the features have no coordinates, or do not tell the side of their tiles, which lie too scattered to show "
            "it. HINT: an attribute patch_size_level0 of `coords`, as TRIDENT writes it, tells it"
        )
    coords, side = places
    try:
        _draw_over(shown, coords[shown.rows], side, path, title, made_of, reader, joined=joined)
    except SlideError:
        return "the slide cannot be read"
    except ValueError:
        if not np.isfinite(shown.attention).all():
            raise
        return "the coordinates do not lie on the slide that the manifest names"
    return None
