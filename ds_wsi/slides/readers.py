"""The reader that opens a slide's path: OpenSlide, also for a folder of DICOM by one of its files, or a plain image."""

from pathlib import Path
from typing import Any

import openslide

from ds_wsi.slides.errors import SlideError
from ds_wsi.slides.plain import NoImageError, PlainImage, PlainImageError

DICOM_MARK = 128, b"DICM"  # place and bytes
# What a reading of a slide can fail with.
READ_ERRORS = (openslide.OpenSlideError, OSError)
FORMATS_HINT = (
    "HINT: slides are SVS, NDPI, MRXS, SCN, tiled TIFF and what else OpenSlide reads, and PNG, JPEG, BMP, WebP or "
    "striped TIFF; is the download whole?"
)


def slide_exists(path: Path) -> bool:
    """Whether there is something to open: a file, or a folder with DICOM."""
    return path.is_file() or (path.is_dir() and any(_is_dicom(file) for file in path.iterdir()))


def _is_dicom(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(DICOM_MARK[0] + len(DICOM_MARK[1])).endswith(DICOM_MARK[1])


def open_handle(path: Path, slide_id: str) -> Any:
    """Open a slide: an `openslide.OpenSlide`, or a `PlainImage` where OpenSlide knows no such format.

    Raises:
        SlideError: no file, no slide, or a slide that cannot be opened.
    """
    where = f"(slide {slide_id}, {path})"
    if path.is_dir():
        path = _file_of_dicom(path, where)
    elif not path.is_file():
        raise SlideError(f"slide must be a file, got none {where}. HINT: check the manifest's `path`.")
    try:
        if openslide.OpenSlide.detect_format(str(path)) is not None:
            return openslide.OpenSlide(str(path))
    except openslide.OpenSlideUnsupportedFormatError:
        pass  # found by its suffix alone
    except openslide.OpenSlideError as error:
        raise SlideError(f"slide must be readable by OpenSlide, got {error} {where}. {FORMATS_HINT}") from error
    try:
        return PlainImage(path)
    except NoImageError as error:
        raise SlideError(
            f"slide must be a plain image or in a format of OpenSlide's, got none of them {where}. {FORMATS_HINT}"
        ) from error
    except PlainImageError as error:
        raise SlideError(f"{error} {where}. HINT: {error.hint or 'replace the file'}.") from error
    except OSError as error:
        raise SlideError(f"slide must be readable, got {error} {where}. {FORMATS_HINT}") from error


def _file_of_dicom(folder: Path, where: str) -> Path:
    """A file of the folder's one DICOM series; OpenSlide finds the others, its levels, beside it."""
    series: dict[str, Path] = {}
    reasons = []
    for path in sorted(path for path in folder.iterdir() if _is_dicom(path)):
        try:
            with openslide.OpenSlide(str(path)) as opened:
                series.setdefault(opened.properties.get("dicom.SeriesInstanceUID", ""), path)
        except openslide.OpenSlideError as error:
            reasons.append(f"{path.name}: {error}")
    if len(series) == 1:
        return next(iter(series.values()))
    if series:
        names = ", ".join(path.name for path in list(series.values())[:3])
        raise SlideError(
            f"folder of DICOM must hold one series, got {len(series)} {where}. HINT: name a file of the one that is "
            f"meant, such as {names}."
        )
    got = f"none that OpenSlide reads ({'; '.join(reasons[:2])})" if reasons else "none"
    raise SlideError(
        f"slide that is a folder must hold the DICOM files of a slide, got {got} {where}. HINT: name its file."
    )
