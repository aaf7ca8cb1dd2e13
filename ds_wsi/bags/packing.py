"""A cohort's tiles packed into a store, and the check that a store holds a cohort."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ds_wsi.bags.cohort import Cohort
from ds_wsi.bags.manifest import ManifestError, SlideEntry
from ds_wsi.bags.shards import own_items, shard_order
from ds_wsi.runtime.locks import lock_path, remove_dead_locks, shared_map
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.shards import ALONE, Shard
from ds_wsi.runtime.temporary import remove_left_behind
from ds_wsi.slides.slide import Slide, SlideError
from ds_wsi.slides.tile_store import QUALITY, StoredSlide, lacks_fingerprint, pack_slide, store_path, store_problem
from ds_wsi.slides.tiling import TileGrid


class PackedSlide(NamedTuple):
    """What became of a slide: its file, whether it was written now, and how many of its tiles were not readable."""

    path: Path
    written: bool
    n_failed: int


def pack_cohort(
    cohort: Cohort,
    directory: str | Path,
    *,
    quality: int = QUALITY,
    workers: int = 1,
    verify: bool = False,
    on_slide: Callable[[], None] = lambda: None,
    shard: Shard = ALONE,
) -> tuple[PackedSlide, ...]:
    """Pack every slide's tiles; slides that are whole in the store already are kept, so that a killed call goes on.

    Several calls may write to a folder, on one machine or many: they take different slides.

    Args:
        cohort: slides and grids.
        directory: the store's folder.
        quality: JPEG's, in tiles that cannot be copied from the slide.
        workers: threads, a slide each.
        verify: see `pack_slide`; a shard checks the slides it begins with, because a check leaves no mark.
        on_slide: called whenever a slide is done.
        shard: this process, where several pack into the folder.

    Raises:
        ManifestError: lists every slide that could not be opened, after the others are packed.
    """

    def pack(row: int) -> PackedSlide | SlideError:
        entry, grid = cohort.manifest.slides[row], cohort.tile_grids[row]
        try:
            with Slide(entry.path, entry.mpp, entry.slide_id, reader=cohort.reader) as slide:
                written = pack_slide(slide, grid, directory, quality, verify and row in to_verify)
            path = store_path(directory, entry.slide_id)
            with StoredSlide(path) as stored:
                n_failed = stored.n_failed
        except SlideError as error:
            return error
        if n_failed:
            logger.warning("slide %s: %d of %d tiles could not be read", entry.slide_id, n_failed, len(grid))
        on_slide()
        return PackedSlide(path, written, n_failed)

    order, to_verify = shard_order(cohort.lengths, shard), own_items(cohort.lengths, shard)
    Path(directory).mkdir(parents=True, exist_ok=True)
    remove_left_behind(Path(directory))
    lock_of = lambda row: lock_path(Path(directory), cohort.manifest.slides[row].slide_id)  # noqa: E731
    packed = dict(zip(order, shared_map(order, lock_of, pack, workers), strict=True))
    remove_dead_locks(Path(directory))
    results = [packed[row] for row in sorted(packed)]
    problems = [str(result) for result in results if isinstance(result, SlideError)]
    if problems:
        raise ManifestError(cohort.manifest.source, problems)
    _tell_unrecorded(directory, cohort.manifest.slides)
    return tuple(result for result in results if isinstance(result, PackedSlide))


def require_store(directory: str, slides: Sequence[SlideEntry], grids: Sequence[TileGrid]) -> None:
    """Refuse a store that does not hold these slides' tiles; an empty name (no store) is fine.

    Raises:
        ManifestError: lists every slide that is missing, torn, or of another grid.
    """
    if not directory:
        return
    answers = [
        store_problem(store_path(directory, entry.slide_id), grid, entry.path)
        for entry, grid in zip(slides, grids, strict=True)
    ]
    problems = [problem for problem in answers if problem]
    if problems:
        raise ManifestError(f"tile store {directory}", problems)
    _tell_unrecorded(directory, slides)


def _tell_unrecorded(directory: str | Path, slides: Sequence[SlideEntry]) -> None:
    """One line where files are of a version that knew a slide by its size alone: they are kept, as packing is long."""
    count = sum(lacks_fingerprint(store_path(directory, entry.slide_id)) for entry in slides)
    if count:
        logger.warning(
            "%s: %d of %d packed slides are of an earlier version, which knew the slide by its size alone: kept. HINT: "
            "delete those whose slide was replaced since.",
            *(directory, count, len(slides)),
        )
