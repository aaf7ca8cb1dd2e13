"""A whole-slide image as DICOM, as small as OpenSlide reads it: one level, tiles of JPEG."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

STORAGE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image
JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
LONG = ("OB", "OW", "SQ", "UT", "UN")


def element(group, number, kind, value):
    if isinstance(value, str):
        value = value.encode() + (b"" if len(value) % 2 == 0 else b"\0" if kind == "UI" else b" ")
    head = struct.pack("<HH2s", group, number, kind.encode())
    head += struct.pack("<HI", 0, len(value)) if kind in LONG else struct.pack("<H", len(value))
    return head + value


def short(group, number, value):
    return element(group, number, "US", struct.pack("<H", value))


def sequence(group, number, *items):
    return element(
        group, number, "SQ", b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item for item in items)
    )


def frames(image, tile):
    for top in range(0, image.shape[0], tile):
        for left in range(0, image.shape[1], tile):
            square = np.full((tile, tile, 3), 255, dtype=np.uint8)
            part = image[top : top + tile, left : left + tile]
            square[: part.shape[0], : part.shape[1]] = part
            buffer = io.BytesIO()
            Image.fromarray(square).save(buffer, "JPEG", quality=95, subsampling=0)
            data = buffer.getvalue()
            yield data + b"\0" * (len(data) % 2)


def write_dicom(path: Path, image: np.ndarray, mpp: float, *, series: str = "1.2.3.1", tile: int = 64) -> Path:
    """Write uint8 [H, W, 3] as the base level of a series."""
    uid = f"{series}.{zlib.crc32(path.name.encode())}"
    pieces = list(frames(image, tile))
    meta = element(2, 1, "OB", b"\0\1") + element(2, 2, "UI", STORAGE) + element(2, 3, "UI", uid)
    meta += element(2, 0x10, "UI", JPEG_BASELINE) + element(2, 0x12, "UI", "1.2.3.4")
    spacing = f"{mpp / 1000:.8g}\\{mpp / 1000:.8g}"
    measures = sequence(0x28, 0x9110, element(0x28, 0x30, "DS", spacing))
    body = [
        element(8, 8, "CS", "ORIGINAL\\PRIMARY\\VOLUME\\NONE"),
        element(8, 0x16, "UI", STORAGE),
        element(8, 0x18, "UI", uid),
        element(8, 0x60, "CS", "SM"),
        element(0x20, 0xD, "UI", "1.2.3"),
        element(0x20, 0xE, "UI", series),
        element(0x20, 0x9311, "CS", "TILED_FULL"),
        short(0x28, 2, 3),
        element(0x28, 4, "CS", "YBR_FULL_422"),
        short(0x28, 6, 0),
        element(0x28, 8, "IS", str(len(pieces))),
        short(0x28, 0x10, tile),
        short(0x28, 0x11, tile),
        short(0x28, 0x100, 8),
        short(0x28, 0x101, 8),
        short(0x28, 0x102, 7),
        short(0x28, 0x103, 0),
        element(0x48, 6, "UL", struct.pack("<I", image.shape[1])),
        element(0x48, 7, "UL", struct.pack("<I", image.shape[0])),
        sequence(0x48, 0x105, element(0x48, 0x106, "SH", "1")),
        sequence(0x5200, 0x9229, measures),
    ]
    offsets, position = [], 0
    for piece in pieces:
        offsets.append(position)
        position += 8 + len(piece)
    table = struct.pack(f"<{len(offsets)}I", *offsets)
    pixels = struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OB", 0, 0xFFFFFFFF)
    pixels += b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(part)) + part for part in (table, *pieces))
    pixels += struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    length = element(2, 0, "UL", struct.pack("<I", len(meta)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0" * 128 + b"DICM" + length + meta + b"".join(body) + pixels)
    return path
