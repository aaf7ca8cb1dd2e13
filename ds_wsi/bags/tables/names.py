"""A slide's name from a file's name or path, and names that can stand for files."""

import re
from collections import Counter
from collections.abc import Sequence

# Of the formats that OpenSlide reads.
IMAGE_SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".svslide", ".vms", ".vmu", ".czi", ".dcm"),
)
# Files in which other projects keep what they computed of a slide, named like it.
DERIVED_SUFFIXES = (".h5", ".pt")
# A slide_id names files: coordinates, features, heat maps.
SLIDE_ID_RULE = re.compile(r"[\w.()+=@ -]+")
MAX_ID_BYTES = 200  # of the 255 that a file's name may have: suffixes and marks of temporary files come after it


def is_slide_id(text: str) -> bool:
    """Whether files can be named by it."""
    return bool(SLIDE_ID_RULE.fullmatch(text)) and len(text.encode()) <= MAX_ID_BYTES


def slide_name(text: str) -> str:
    """A slide's id from a file's name or path; barcodes hold dots, so that only known suffixes are cut."""
    return _without_suffix(text.replace("\\", "/").rsplit("/", 1)[-1])


def path_name(text: str) -> str:
    """A slide's id from its path below a folder, P1/S1.svs -> P1_S1: where names of files alone repeat."""
    parts = [part for part in text.replace("\\", "/").split("/") if part not in ("", ".")]
    return _without_suffix("_".join(parts))


def slide_names(texts: Sequence[str]) -> list[str]:
    """The slides' ids from files' names or paths: the names, and the paths of those whose name another path has too."""
    names = [slide_name(text) for text in texts]
    paths = {(name, text) for name, text in zip(names, texts, strict=True)}
    counts = Counter(name for name, _ in paths)
    return [path_name(text) if counts[name] > 1 else name for name, text in zip(names, texts, strict=True)]


def _without_suffix(name: str) -> str:
    suffix = next((end for end in (*IMAGE_SUFFIXES, *DERIVED_SUFFIXES) if name.lower().endswith(end)), "")
    return name[: len(name) - len(suffix)] if suffix else name


def repeated_ids(slide_ids: Sequence[str], places: Sequence[str]) -> list[str]:
    """A problem for each name that stands in two rows; `places` say where each row stands."""
    first: dict[str, str] = {}
    problems = []
    for slide_id, row_place in zip(slide_ids, places, strict=True):
        if slide_id in first:
            pair = (first[slide_id], row_place)
            plain = all(each.startswith("row ") for each in pair)
            where = "rows " + " and ".join(each[4:] for each in pair) if plain else " and ".join(pair)
            problems.append(
                f"slide_id must be unique, got {slide_id!r} in {where}. "
                "HINT: take one out, or name the slides by folder and file."
            )
        first.setdefault(slide_id, row_place)
    return problems
