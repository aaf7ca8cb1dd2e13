"""One file under several ids: named, and refused where it stands on both sides of a split."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from ds_wsi.bags.manifest import Manifest, ManifestError, SlideEntry
from ds_wsi.runtime.fingerprint import Fingerprint
from ds_wsi.runtime.log import logger
from ds_wsi.slides.fingerprint import slide_fingerprint

SHOWN = 3


def slide_fingerprints(slides: Iterable[SlideEntry]) -> list[Fingerprint | None]:
    """The fingerprint of each slide's file; None where it cannot be read, which opening it will say."""
    return [fingerprint_of(slide) for slide in slides]


def fingerprint_of(slide: SlideEntry) -> Fingerprint | None:
    """The fingerprint of the slide's file; None where it cannot be read, or is empty as failed downloads are."""
    try:
        fingerprint = slide_fingerprint(slide.path)
    except (OSError, ValueError):  # missing, not ours to read, or no file
        return None
    return fingerprint if fingerprint.n_bytes else None


def files_across_splits(slides: Sequence[SlideEntry], known_by: Sequence[object | None]) -> list[str]:
    """A line for each file that stands under several ids in different splits.

    Args:
        slides: the cohort's.
        known_by: what each slide's file is known by; equal ones are one file, None is not compared.
    """
    return [
        f"a file must be on one side of a split, got one file under several ids: {_named(same)}. HINT: leave "
        "out all but one, or give them one patient_id and let splits be drawn."
        for same in _shared(slides, known_by)
        if len({slide.split for slide in same}) > 1
    ]


def warn_of_shared_files(slides: Sequence[SlideEntry], known_by: Sequence[object | None]) -> None:
    """Name the files that stand under several ids of one split, or of none yet, in one line; args as above."""
    within = [same for same in _shared(slides, known_by) if len({slide.split for slide in same}) == 1]
    if within:
        more = f", and {len(within) - SHOWN} more" if len(within) > SHOWN else ""
        logger.warning("one file under several ids: %s%s", "; ".join(map(_named, within[:SHOWN])), more)


def require_files_apart(manifest: Manifest, known_by: Sequence[object | None] | None = None) -> None:
    """Refuse splits with one file on two sides, where they were drawn or read after the files were opened.

    Args:
        manifest: the slides, with splits.
        known_by: see `files_across_splits`; None takes the slides' fingerprints.

    Raises:
        ManifestError: lists every such file.
    """
    problems = files_across_splits(manifest.slides, known_by or slide_fingerprints(manifest.slides))
    if problems:
        raise ManifestError(manifest.source, problems)


def _shared(slides: Sequence[SlideEntry], known_by: Sequence[object | None]) -> list[list[SlideEntry]]:
    """The slides of each file that several ids name."""
    slides_of: dict[object, dict[str, SlideEntry]] = defaultdict(dict)
    for slide, content in zip(slides, known_by, strict=True):
        if content is not None:
            slides_of[content].setdefault(slide.slide_id, slide)
    return [list(same.values()) for same in slides_of.values() if len(same) > 1]


def _named(same: Sequence[SlideEntry]) -> str:
    shown = [f"{slide.slide_id} ({slide.split or 'no split yet'}, {slide.path.name})" for slide in same[:SHOWN]]
    return " and ".join(shown) + (f" and {len(same) - SHOWN} more" if len(same) > SHOWN else "")
