"""Images of one level (PNG, JPEG, BMP, WebP, striped TIFF) as slides, behind the names of OpenSlide.

BMP and striped TIFF are read by rows, in bounded memory; the other formats can only be decoded whole.
"""

import mmap
import struct
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

DECODED_WHOLE = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
# Pillow's own limit against decompression bombs: about 13,400 x 13,400 px, 0.5 GiB decoded.
MAX_DECODED_PIXELS = 2 * 89_478_485
STRIPS_BYTES = 2**25  # of decoded strips that are kept
RGB_MODES = ("RGB", "L", "P", "LA", "RGBA", "PA")
OTHER_MODES = {
    "1": "one bit",
    "I": "32 bits",
    "F": "floating point numbers",
    "CMYK": "inks (CMYK)",
    "LAB": "CIELAB colours",
}
DEEP = "convert it to 8 bits per channel; how its values map to grey levels is not in the file"
TO_RGB = "convert it to RGB"
ONE_IMAGE = "write the one that is meant to a file of its own"

RESOLUTION_SOURCE = "ds_wsi.resolution-source"  # property: where a resolution comes from that is no TIFF's

ReadRows = Callable[[int, int], np.ndarray]  # (top, bottom) -> uint8 [bottom - top, W, 3 or 4]


class PlainImageError(OSError):
    """An image that cannot be used as a slide: the message is the reason, `hint` the remedy."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


class NoImageError(PlainImageError):
    """A file that is no image of these formats."""


class PlainImage:
    """An image as a slide of one level; has what this project uses of `openslide.OpenSlide`.

    Args:
        path: the image file.

    Raises:
        PlainImageError: no image of these formats, or one whose pixels are no colours of 8 bits.
    """

    level_downsamples = (1.0,)

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._close: Callable[[], None] = lambda: None
        self.properties: dict[str, str] = {}
        with _torn_files_named():
            opened = _open_bmp(path) or _open_strips(path) or _open_whole(path)
        self.dimensions, self._rows, self._close, self.properties = opened
        self.level_dimensions = (self.dimensions,)

    def close(self) -> None:
        """Let the file and what is decoded of it go."""
        self._close()

    def set_cache(self, cache: Any) -> None:
        """Nothing: strips and images are kept decoded by their own bounds."""

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """The pixels of a rectangle as RGBA, transparent outside the image, as OpenSlide returns them.

        Raises:
            OSError: the file is damaged.
        """
        (left, top), (width, height) = location, size
        region = np.zeros((height, width, 4), dtype=np.uint8)
        x0, x1 = max(left, 0), min(left + width, self.dimensions[0])
        y0, y1 = max(top, 0), min(top + height, self.dimensions[1])
        if x0 < x1 and y0 < y1:
            with self._lock, _torn_files_named():
                pixels = self._rows(y0, y1)[:, x0:x1]
            inside = region[y0 - top : y1 - top, x0 - left : x1 - left]
            inside[..., : pixels.shape[2]] = pixels
            if pixels.shape[2] == 3:
                inside[..., 3] = 255
        return Image.fromarray(region, "RGBA")


@contextmanager
def _torn_files_named() -> Iterator[None]:
    """Parsers of torn files raise whatever their next line trips over: it becomes an error of the file."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise PlainImageError(f"image must be whole, got {type(error).__name__}: {reason}") from error


_Opened = tuple[tuple[int, int], ReadRows, Callable[[], None], dict[str, str]]


def _open_bmp(path: Path) -> _Opened | None:
    """An uncompressed BMP of 24 or 32 bits, mapped; None for another file."""
    with path.open("rb") as file:
        head = file.read(54)
        if len(head) < 54 or head[:2] != b"BM":
            return None
        (offset,) = struct.unpack_from("<I", head, 10)
        size, width, height, _, bits, compression = struct.unpack_from("<IiiHHI", head, 14)
        if size < 40 or bits not in (24, 32) or compression != 0 or width < 1 or height == 0:
            return None  # Pillow's
        stride = (width * bits // 8 + 3) // 4 * 4
        rows = abs(height)
        needed = offset + stride * rows
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if len(mapped) < needed:
        n_bytes = len(mapped)
        mapped.close()
        raise PlainImageError(f"image must hold {needed} bytes, got {n_bytes}: the file is cut short")
    bottom_up = height > 0

    def read(top: int, bottom: int) -> np.ndarray:
        first = rows - bottom if bottom_up else top
        start = offset + first * stride
        lines = np.frombuffer(mapped[start : start + (bottom - top) * stride], dtype=np.uint8)
        lines = lines.reshape(bottom - top, stride)[:, : width * bits // 8].reshape(bottom - top, width, bits // 8)
        return (lines[::-1] if bottom_up else lines)[..., 2::-1]

    return (width, rows), read, mapped.close, {}


def _open_strips(path: Path) -> _Opened | None:
    """A TIFF of 8 bits per channel in strips, decoded strip by strip; None for another file."""
    try:
        file = tifffile.TiffFile(path)
    except (tifffile.TiffFileError, OSError, ValueError):
        return None
    try:
        page: Any = file.pages[0]
        _require_colours(page)
        _require_one_image(file)
        samples = page.samplesperpixel
        photometric = page.photometric.name if page.photometric is not None else "RGB"
        supported = photometric in ("RGB", "MINISBLACK", "YCBCR") and samples in (1, 3, 4)
        if page.is_tiled or not supported or (samples > 1 and page.planarconfig != 1):
            file.close()
            return None
    except BaseException:
        file.close()
        raise
    strips = _Strips(file, page)
    if strips.rows_per_strip * strips.width > MAX_DECODED_PIXELS and page.compression != 1:
        file.close()
        raise _bomb(strips.width, strips.rows_per_strip, "a strip of it decoded whole")
    contiguous = page.compression == 1 and len(page.dataoffsets) == 1 and page.predictor == 1 and page.fillorder == 1
    read = strips.read_bytes if contiguous else strips.read
    return (strips.width, page.imagelength), read, strips.close, _tiff_resolution(page)


class _Strips:
    """The rows of a TIFF in strips; decoded strips are kept, `STRIPS_BYTES` of them.

    Args:
        file: the TIFF, which `close` closes.
        page: the page of the image.
    """

    def __init__(self, file: tifffile.TiffFile, page: Any) -> None:
        self.file, self.page = file, page
        self.width, self.samples = page.imagewidth, page.samplesperpixel
        self.rows_per_strip = min(page.rowsperstrip, page.imagelength)
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()

    def read(self, top: int, bottom: int) -> np.ndarray:
        """Rows out of the strips that hold them."""
        first, last = top // self.rows_per_strip, (bottom - 1) // self.rows_per_strip
        parts = []
        for number in range(first, last + 1):
            start = number * self.rows_per_strip
            parts.append(self._strip(number)[max(top - start, 0) : bottom - start])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def read_bytes(self, top: int, bottom: int) -> np.ndarray:
        """Rows of one strip as large as the image, as many programs write it: only those asked for are read."""
        n_bytes = self.width * self.samples
        self.file.filehandle.seek(self.page.dataoffsets[0] + top * n_bytes)
        data = self.file.filehandle.read((bottom - top) * n_bytes)
        if len(data) < (bottom - top) * n_bytes:
            raise PlainImageError("image must be whole, got an end of the file in its rows")
        return _three_or_four(np.frombuffer(data, dtype=np.uint8).reshape(bottom - top, self.width, self.samples))

    def close(self) -> None:
        """Let the file and the decoded strips go."""
        self._kept.clear()
        self.file.close()

    def _strip(self, number: int) -> np.ndarray:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        self.file.filehandle.seek(self.page.dataoffsets[number])
        data = self.file.filehandle.read(self.page.databytecounts[number])
        decoded = self.page.decode(data, number, jpegtables=self.page.jpegtables)[0]
        if decoded is None:
            raise PlainImageError(f"strip {number} must be in the file, got no bytes")
        pixels = _three_or_four(decoded.reshape(-1, self.width, self.samples))
        self._kept[number] = pixels
        while sum(one.nbytes for one in self._kept.values()) > STRIPS_BYTES and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return pixels


def _three_or_four(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def _require_colours(page: Any) -> None:
    if page.bitspersample != 8 and page.bitspersample != 1:
        raise PlainImageError(f"image must have 8 bits per channel, got {page.bitspersample}", DEEP)
    name = page.photometric.name if page.photometric is not None else "RGB"
    if name not in ("RGB", "MINISBLACK", "YCBCR", "PALETTE") or page.samplesperpixel not in (1, 2, 3, 4):
        raise PlainImageError(
            f"image must be RGB, grey or of a palette, got {name} of {page.samplesperpixel} channels",
            TO_RGB,
        )


def _require_one_image(file: tifffile.TiffFile) -> None:
    first: Any = file.pages[0]
    size = (first.imagewidth, first.imagelength)
    others = [page for page in list(file.pages)[1:] if (page.imagewidth, page.imagelength) == size]
    if others:
        raise PlainImageError(
            f"TIFF must hold one image of its size, got {len(others) + 1} of {size[0]} x {size[1]} px", ONE_IMAGE
        )


def _tiff_resolution(page: Any) -> dict[str, str]:
    """The resolution tags under OpenSlide's names."""
    properties = {}
    for name in ("XResolution", "YResolution"):
        value = page.tags.get(name)
        if value is not None and value.value[1]:
            properties[f"tiff.{name}"] = str(value.value[0] / value.value[1])
    unit = page.tags.get("ResolutionUnit")
    properties["tiff.ResolutionUnit"] = {2: "inch", 3: "centimeter"}.get(int(unit.value) if unit else 2, "none")
    return properties


def _open_whole(path: Path) -> _Opened:
    """An image that Pillow decodes as a whole, at the first reading."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is the one that counts
            image = Image.open(path, formats=DECODED_WHOLE)
    except UnidentifiedImageError as error:
        raise NoImageError("no image") from error
    except Image.DecompressionBombError as error:
        raise PlainImageError(f"{_bomb_words()}, got more ({error})") from error
    try:
        _require_plain(image)
    except BaseException:
        image.close()
        raise
    decoded: list[np.ndarray] = []

    def read(top: int, bottom: int) -> np.ndarray:
        if not decoded:
            with Image.open(path, formats=DECODED_WHOLE) as opened:
                decoded.append(np.asarray(opened.convert("RGBA" if opened.has_transparency_data else "RGB")))
        return decoded[0][top:bottom]

    size, dpi = image.size, image.info.get("dpi")
    image.close()
    properties = {}
    if dpi:
        properties = {"tiff.ResolutionUnit": "inch", RESOLUTION_SOURCE: "the image's dots an inch"}
        properties |= {f"tiff.{axis}Resolution": str(float(value)) for axis, value in zip("XY", dpi, strict=True)}
    return size, read, decoded.clear, properties


def _require_plain(image: Image.Image) -> None:
    if image.mode not in RGB_MODES:
        words = OTHER_MODES.get(image.mode, "16 bits" if image.mode.startswith("I;16") else image.mode)
        hint = DEEP if "bits" in words or "numbers" in words else TO_RGB
        raise PlainImageError(f"image must be RGB, grey or of a palette, of 8 bits per channel, got {words}", hint)
    if _is_deep_png(image):
        raise PlainImageError("image must have 8 bits per channel, got 16", DEEP)
    if getattr(image, "n_frames", 1) > 1:
        raise PlainImageError(f"image must be one, got {getattr(image, 'n_frames', 1)} frames", ONE_IMAGE)
    if image.width * image.height > MAX_DECODED_PIXELS:
        raise _bomb(image.width, image.height, "it whole")


def _is_deep_png(image: Image.Image) -> bool:
    """Whether a PNG has 16 bits per channel, of which Pillow would drop the lower 8 without a word."""
    return image.format == "PNG" and any("16" in str(entry[3]) for entry in getattr(image, "tile", ()))


def _bomb_words() -> str:
    return f"image that is decoded whole must have at most {MAX_DECODED_PIXELS:,} px"


def _bomb(width: int, height: int, what: str) -> PlainImageError:
    return PlainImageError(
        f"{_bomb_words()}, got {width} x {height} ({what})",
        "convert it to a tiled TIFF, as with `vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg`",
    )
