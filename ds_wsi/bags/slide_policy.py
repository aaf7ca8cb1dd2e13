"""How a cohort's slides are opened: masks from outside, slides that are left out; and what is told of them all."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.runtime.files import atomic_path
from ds_wsi.runtime.log import logger
from ds_wsi.slides.errors import SlideError
from ds_wsi.slides.masks import SUFFIXES, MaskFile, find_mask
from ds_wsi.slides.policy import AUTO
from ds_wsi.slides.tiling import TileGrid

SKIPPED_FILE = "skipped_slides.csv"
SHOWN = 5
# Of the scanned area: beyond these, tissue is looked at once more.
ALMOST_ALL, ALMOST_NONE, MUCH_LESS_THAN_GREY = 0.98, 0.005, 0.5


class SkippedSlide(NamedTuple):
    """A slide that is left out, and why."""

    slide_id: str
    path: str
    reason: str


@dataclass(frozen=True)
class SlidePolicy:
    """How the slides of a cohort are opened.

    Args:
        tissue_masks: folder of `<slide_id>.geojson` or `.png` that say where tissue is; slides without one are tiled by
            the policy's rule.
        masks_in_bounds: see `MaskFile.in_bounds`.
        skip_bad_slides: leave out slides that cannot be used, where they would be refused.
        skipped: exactly the slides that another process has left out; None decides here.
        reader: see `Slide`.
    """

    tissue_masks: str | Path | None = None
    masks_in_bounds: bool = False
    skip_bad_slides: bool = False
    skipped: tuple[SkippedSlide, ...] | None = None
    reader: str = AUTO

    def wanted(self, slides: Sequence[SlideEntry]) -> tuple[SlideEntry, ...]:
        """The slides to open."""
        left_out = {slide.slide_id for slide in self.skipped or ()}
        return tuple(slide for slide in slides if slide.slide_id not in left_out)

    def mask_of(self, entry: SlideEntry) -> MaskFile | None:
        """The slide's mask, where it has one.

        Raises:
            SlideError: it has two.
        """
        path = find_mask(self.tissue_masks, entry.slide_id) if self.tissue_masks else None
        return None if path is None else MaskFile(path, self.masks_in_bounds)

    def masks_problem(self, slides: Sequence[SlideEntry]) -> str | None:
        """Why the folder of masks cannot be meant for these slides, or None."""
        if not self.tissue_masks:
            return None
        folder = Path(self.tissue_masks)
        names = {f"{slide.slide_id}{suffix}" for slide in slides for suffix in SUFFIXES}
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if names & there:
            return None
        got = f"{len(there)} other files" if folder.is_dir() else "no such folder"
        return (
            f"--tissue_masks must hold the mask of a slide, <slide_id>.geojson or .png, got {got} ({folder}). HINT: "
            "name them after the slide_id; `ds-wsi tile --export_masks DIR` writes some."
        )

    def leave_out(
        self, slides: Sequence[SlideEntry], results: Sequence[object]
    ) -> tuple[tuple[SkippedSlide, ...], list[str]]:
        """The slides that are left out, and the problems of the others.

        Args:
            slides: the slides that were opened.
            results: one per slide: a SlideError, or anything else.
        """
        bad = [
            (slide, str(error)) for slide, error in zip(slides, results, strict=True) if isinstance(error, SlideError)
        ]
        if self.skipped is not None:
            return self.skipped, [reason for _, reason in bad]
        if not self.skip_bad_slides or len(bad) == len(slides):
            return (), [reason for _, reason in bad]
        return tuple(SkippedSlide(slide.slide_id, str(slide.path), reason) for slide, reason in bad), []


AS_THEY_ARE = SlidePolicy()


def tell_skipped(skipped: Sequence[SkippedSlide], n_slides: int) -> None:
    """Warn of the slides that were left out, one by one."""
    if not skipped:
        return
    lines = "\n".join(f"  {slide.slide_id}: {slide.reason}" for slide in skipped)
    logger.warning("%d of %d slides left out (--skip_bad_slides):\n%s", len(skipped), n_slides, lines)


def skipped_words(skipped: Sequence[SkippedSlide]) -> dict[str, str]:
    """The lines of a report's summary; empty where none was left out."""
    if not skipped:
        return {}
    names = ", ".join(slide.slide_id for slide in skipped)
    return {"slides left out": f"{len(skipped)} that could not be used ({names}), see {SKIPPED_FILE}"}


def write_skipped(directory: str | Path, skipped: Sequence[SkippedSlide]) -> None:
    """Write the slides that were left out as CSV; the file of an earlier call goes where there are none."""
    path = Path(directory) / SKIPPED_FILE
    if not skipped:
        path.unlink(missing_ok=True)
        return
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(SkippedSlide._fields)
        writer.writerows(skipped)


def tell_tissue(grids: Sequence[TileGrid], with_masks: bool) -> None:
    """Log the share of tissue over all slides, and warn of slides where it is extreme, one line per kind."""
    measured = [(grid, grid.tissue) for grid in grids if grid.tissue is not None and grid.policy.tissue != "none"]
    if with_masks:
        masked = sum(bool(tissue.mask) for _, tissue in measured)
        logger.info("tissue: %d of %d slides by their masks, the others by --tissue", masked, len(grids))
    if not measured:
        return
    shares = [tissue.share for _, tissue in measured]
    kept, whole = sum(len(grid) for grid, _ in measured), sum(tissue.n_whole for _, tissue in measured)
    logger.info(
        "tissue: %.0f%% of the scanned area (%.0f%% to %.0f%% a slide); %d of %d tiles kept (%.0f%%)",
        *(100 * sum(shares) / len(shares), 100 * min(shares), 100 * max(shares), kept, whole, 100 * kept / whole),
    )
    by_rule = [(grid, tissue) for grid, tissue in measured if not tissue.mask]
    kinds = (
        (
            f"are tissue nearly everywhere (over {ALMOST_ALL:.0%}): crops are, else glass was taken for tissue",
            [grid for grid, tissue in by_rule if tissue.share > ALMOST_ALL],
        ),
        (
            f"have hardly any tissue (under {ALMOST_NONE:.1%})",
            [grid for grid, tissue in by_rule if tissue.share < ALMOST_NONE],
        ),
        (
            "have much less tissue than their grey values say: pale, pen or dark glass",
            [
                grid
                for grid, tissue in by_rule
                if tissue.grey_share and tissue.share < MUCH_LESS_THAN_GREY * tissue.grey_share
            ],
        ),
    )
    for words, some in kinds:
        if some:
            _warn(f"{words}. HINT: look at them with `ds-wsi tile --export_masks DIR`; --tissue has other rules", some)
    unreadable = [grid for grid, tissue in measured if tissue.n_unreadable]
    if unreadable:
        n_tiles = sum(grid.tissue.n_unreadable for grid in unreadable if grid.tissue is not None)
        _warn(
            f"are broken in places: {n_tiles} tiles whose tissue is not known are kept, and fail when read", unreadable
        )


def _warn(words: str, grids: Sequence[TileGrid]) -> None:
    names = ", ".join(grid.slide_id for grid in grids[:SHOWN]) + (", ..." if len(grids) > SHOWN else "")
    logger.warning("%d slides (%s) %s", len(grids), names, words)
