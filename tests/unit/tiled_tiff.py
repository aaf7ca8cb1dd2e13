"""Tiled JPEG TIFFs of every kind that OpenSlide reads, written by hand: what is in the file is what was asked for."""

import io
import struct
from dataclasses import dataclass, field
from pathlib import Path

import imagecodecs
import numpy as np
from PIL import Image

RGB, YCBCR = 2, 6
SHORT, LONG, LONG8, ASCII, UNDEFINED = 3, 4, 16, 2, 7
LETTERS = {SHORT: "H", LONG: "I", LONG8: "Q"}
TABLES = (0xDB, 0xC4)  # DQT, DHT
HEAD_BYTES = 16


@dataclass
class Page:
    """One image.

    Attributes:
        size: width and height.
        tile: width and height of its tiles.
        absent: the tiles left out, by number.
        contrast: 1, or less: no value is then near 0 or 255.
        tags: others, (type, value) by tag; None takes one away.
    """

    size: tuple[int, int]
    tile: tuple[int, int] = (64, 64)
    absent: frozenset[int] = frozenset()
    contrast: float = 1.0
    tags: dict = field(default_factory=dict)

    @property
    def image(self):
        """uint8 [H, W, 3]: RGB, or the planes that YCbCr is stored in."""
        pixels = picture(self.size[1], self.size[0], seed=sum(self.size))
        return (128 + self.contrast * (pixels.astype(float) - 128)).astype(np.uint8)


@dataclass
class Kind:
    """How the file is written."""

    order: str = "<"
    big: bool = False
    photometric: int = YCBCR
    subsampling: str = "420"
    tables_apart: bool = False
    progressive: bool = False
    restart_rows: int = 0
    marker: bytes = b""  # a segment of each tile that says something of colours, or nothing
    quality: int = 80
    short_counts: bool = False
    description: bytes = b""
    directories_first: bool = False


def segments(jpeg):
    """The marker segments before the scan, and what comes after them."""
    position, pieces = 2, []
    while jpeg[position + 1] != 0xDA:
        end = position + 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")
        pieces.append(jpeg[position:end])
        position = end
    return pieces, jpeg[position:]


def encode(tile, kind):
    """uint8 [h, w, 3] to (tables, stream): the planes are stored as they are, whatever their colours."""
    if kind.subsampling in ("440", "411"):
        options = {"colorspace": "YCBCR", "outcolorspace": "YCBCR", "subsampling": kind.subsampling}
        jpeg = imagecodecs.jpeg8_encode(np.ascontiguousarray(tile), level=kind.quality, **options)
    else:
        buffer = io.BytesIO()
        image = Image.frombytes("YCbCr", tile.shape[1::-1], tile.tobytes())
        options = {"restart_marker_rows": kind.restart_rows} if kind.restart_rows else {}
        names = {"444": 0, "422": 1, "420": 2}
        image.save(
            buffer,
            "JPEG",
            quality=kind.quality,
            subsampling=names[kind.subsampling],
            progressive=kind.progressive,
            **options,
        )
        jpeg = buffer.getvalue()
    parts, scan = segments(jpeg)
    parts = [part for part in parts if not 0xE0 <= part[1] <= 0xEF]
    tables = b"".join(part for part in parts if part[1] in TABLES)
    kept = [part for part in parts if not (kind.tables_apart and part[1] in TABLES)]
    return b"\xff\xd8" + tables + b"\xff\xd9", b"\xff\xd8" + kind.marker + b"".join(kept) + scan


def tiles_of(page):
    """The tiles in their order, those at the borders filled with the image's last pixels."""
    width, height = page.tile
    rows, columns = -(-page.size[1] // height), -(-page.size[0] // width)
    reach = (rows * height - page.size[1], columns * width - page.size[0])
    padded = np.pad(page.image, ((0, reach[0]), (0, reach[1]), (0, 0)), mode="edge")
    for row in range(rows):
        for column in range(columns):
            yield padded[row * height : (row + 1) * height, column * width : (column + 1) * width]


def write_tiff(path, pages, kind):
    """Write the pages; returns the place and size of each tile of each page."""
    data, places, tables = bytearray(), [], []
    for page in pages:
        places.append([])
        tables.append(b"")
        for index, tile in enumerate(tiles_of(page)):
            if index in page.absent:
                places[-1].append((0, 0))
                continue
            tables[-1], stream = encode(tile, kind)
            places[-1].append((len(data), len(stream)))
            data += stream + bytes(len(stream) % 2)
    first = len(_file(pages, places, tables, data, kind, 0)) - len(data) if kind.directories_first else HEAD_BYTES
    Path(path).write_bytes(_file(pages, places, tables, data, kind, first))
    return [[(first + at, size) if size else (0, 0) for at, size in tiles] for tiles in places]


def _file(pages, places, tables, data, kind, first):
    """The whole file, whose tiles begin at `first`."""
    out = bytearray((b"II" if kind.order == "<" else b"MM") + struct.pack(kind.order + "H", 43 if kind.big else 42))
    out += struct.pack(kind.order + "HH", 8, 0) if kind.big else b""
    link = len(out)  # where the next directory's place is to be written
    out = out.ljust(HEAD_BYTES, b"\0")
    if not kind.directories_first:
        out += data
    for number, page in enumerate(pages):
        offsets = [first + at if size else 0 for at, size in places[number]]
        tags = _tags(number, page, offsets, [size for _, size in places[number]], kind)
        if kind.tables_apart and tables[number]:
            tags[347] = (UNDEFINED, tables[number])
        tags.update(page.tags)
        link = _write_directory(out, link, {tag: value for tag, value in tags.items() if value is not None}, kind)
    if not kind.big:
        # OpenSlide reads 8 bytes there and, of a big-endian file, believes the last four: they hold the same.
        out[8:12] = out[4:8]
    return out + data if kind.directories_first else out


def _tags(number, page, offsets, counts, kind):
    tags = {
        254: (LONG, [min(number, 1)]),
        256: (LONG, [page.size[0]]),
        257: (LONG, [page.size[1]]),
        258: (SHORT, [8, 8, 8]),
        259: (SHORT, [7]),
        262: (SHORT, [kind.photometric]),
        277: (SHORT, [3]),
        284: (SHORT, [1]),
        322: (SHORT, [page.tile[0]]),
        323: (SHORT, [page.tile[1]]),
        324: (LONG8 if kind.big else LONG, offsets),
        325: (SHORT if kind.short_counts and max(counts) < 2**16 else LONG, counts),
    }
    if kind.description:
        tags[270] = (ASCII, kind.description + b"\0")
    return tags


def _write_directory(out, link, tags, kind):
    """Append a directory and what its entries point to; returns where the place of the next one belongs."""
    offset_form = "Q" if kind.big else "I"
    size = struct.calcsize(offset_form)
    entries = []
    for tag, (kind_of_values, values) in sorted(tags.items()):
        data = values if isinstance(values, bytes) else b""
        if not isinstance(values, bytes):
            data = struct.pack(f"{kind.order}{len(values)}{LETTERS[kind_of_values]}", *values)
        if len(data) > size:
            at = len(out)
            out += data + bytes(len(data) % 2)
            data = struct.pack(kind.order + offset_form, at)
        entries.append(
            struct.pack(f"{kind.order}HH{offset_form}", tag, kind_of_values, len(values)) + data.ljust(size, b"\0")
        )
    struct.pack_into(kind.order + offset_form, out, link, len(out))
    out += struct.pack(kind.order + ("Q" if kind.big else "H"), len(entries)) + b"".join(entries)
    out += bytes(size)
    return len(out) - size


def picture(height, width, seed=0):
    """Smooth colours with some grain: uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(30, 225, (5, 5, 3), dtype=np.uint8)).resize((width, height))
    return np.clip(np.asarray(smooth) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)
