"""A slide's tiles packed once as JPEG: one Arrow file per slide, read by (slide, row) without opening the slide.

Where the tiles of the grid are the TIFF's own JPEG tiles, their bytes are copied, and the pixels are OpenSlide's. Other
tiles are encoded anew, at the quality that the file names. The file is an Arrow stream, as `datasets` writes it
(`datasets.Dataset.from_file` opens it), and appears under its name when it is whole. Nothing of it is believed: a seal
is checked when it is opened (see `store_seal`), and a tile's CRC-32 at each reading. Files of version 1 have no seal;
what Arrow can check of them is checked.
"""

import hashlib
import io
import json
import os
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from ds_wsi.runtime.files import atomic_path
from ds_wsi.slides.direct.errors import NotDirectError
from ds_wsi.slides.direct.jpeg_stream import decode
from ds_wsi.slides.fingerprint import slide_fingerprint
from ds_wsi.slides.jpeg_tiles import JpegTiles
from ds_wsi.slides.policy import BOX
from ds_wsi.slides.slide import Slide, SlideError, TileReadError
from ds_wsi.slides.store_seal import is_sealed, seal
from ds_wsi.slides.tiling import TileGrid

FORMAT, VERSION = "ds_wsi.TileStore", "2"
UNSEALED = "1"  # a version
_NEEDED = {"n_tiles", "slide_id", "quality"}  # of the head
FINGERPRINT = "slide_sha256"
HEAD_BYTES = 2**16
QUALITY = 90  # with chroma at full resolution: a mean error of about one grey level on stained tissue
BATCH_TILES, BATCH_BYTES = 256, 2**25  # whichever is reached first; Arrow's offsets end at 2 GiB
HINT = "HINT: pack it again with `ds-wsi tile --store DIR --verify`."
SCHEMA = pa.schema(
    [
        ("x", pa.int64()),
        ("y", pa.int64()),
        ("jpeg", pa.binary()),
        ("crc32", pa.uint32()),
        ("copied", pa.bool_()),
        ("reason", pa.string()),
    ]
)


class StoreError(SlideError):
    """A store that cannot be read from; the message names the file, the reason and the remedy."""


@dataclass(frozen=True)
class PackedTile:
    """One tile of a store: its JPEG, or the reason for which it could not be read from the slide."""

    jpeg: bytes | None
    copied: bool = False
    reason: str | None = None


def store_path(directory: str | Path, slide_id: str) -> Path:
    """The file of a slide's tiles."""
    return Path(directory) / f"{slide_id}.arrow"


def pack_slide(
    slide: Slide, grid: TileGrid, directory: str | Path, quality: int = QUALITY, verify: bool = False
) -> bool:
    """Write a slide's tiles, atomically; a whole file of the same grid, slide and quality is kept.

    The slide is known by its content: see `slide_fingerprint`. A file of that name that is no store's is not touched.

    A process that is killed leaves no file, or a whole one: the next call begins the slide again, or keeps it.

    Args:
        slide: open.
        grid: the slide's tiles, the rows of the store.
        directory: the store's folder.
        quality: JPEG's, 1 to 100, for the tiles that cannot be copied.
        verify: whether a file that is there is read, and kept only where every tile has its checksum.

    Returns:
        Whether the file was written now.

    Raises:
        StoreError: a file of another program has the name.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"JPEG quality must be in [1, 100], got {quality}. HINT: 90 is the default.")
    path = store_path(directory, grid.slide_id)
    whole = path.exists() and store_problem(path, grid, slide.path, quality) is None
    if whole and not (verify and damaged_rows(path)):
        return False
    _require_ours(path, grid.slide_id)
    header = _header(grid, slide.path, quality)
    schema = SCHEMA.with_metadata({"ds_wsi": json.dumps(header)})
    with atomic_path(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, schema) as out:
            rows: list[tuple[Any, ...]] = []
            n_bytes = 0
            for (x, y), tile in zip(grid.coords.tolist(), _packed(slide, grid, quality), strict=True):
                crc = None if tile.jpeg is None else zlib.crc32(tile.jpeg)
                rows.append((x, y, tile.jpeg, crc, tile.copied, tile.reason))
                n_bytes += len(tile.jpeg or b"")
                if len(rows) == BATCH_TILES or n_bytes >= BATCH_BYTES:
                    out.write_batch(_batch(rows, schema))
                    rows, n_bytes = [], 0
            if rows:
                out.write_batch(_batch(rows, schema))
        seal(temporary, "jpeg")
    return True


def _batch(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.RecordBatch:
    columns = [pa.array(values, kind.type) for values, kind in zip(zip(*rows, strict=True), schema, strict=True)]
    return pa.record_batch(columns, schema=schema)


def _packed(slide: Slide, grid: TileGrid, quality: int) -> Iterator[PackedTile]:
    """Tile after tile of the grid: copied where the slide has it as JPEG, else encoded."""
    jpeg_tiles = JpegTiles.of(slide, grid)
    try:
        for x, y in grid.coords.tolist():
            jpeg = jpeg_tiles.read(x, y) if jpeg_tiles else None
            if jpeg is not None:
                yield PackedTile(jpeg, copied=True)
                continue
            try:
                tile = slide.read_tile(
                    x, y, grid.level, grid.read_size_px, grid.tile_size_px, shrink=grid.policy.shrink
                )
            except TileReadError as error:
                yield PackedTile(None, reason=str(error.cause))
            else:
                yield PackedTile(_encode(tile, quality))
    finally:
        if jpeg_tiles:
            jpeg_tiles.close()


def _encode(tile: np.ndarray, quality: int) -> bytes:
    """uint8 [S, S, 3] to JPEG with chroma at full resolution."""
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _require_ours(path: Path, slide_id: str) -> None:
    """Only a file that a store's own head begins, whole or torn, is packed anew."""
    if not os.path.lexists(path):
        return
    head = path.open("rb").read(HEAD_BYTES) if path.is_file() and not path.is_symlink() else b""
    if FORMAT.encode() not in head:
        raise StoreError(
            f"tile store must be a folder without files of other programs, got {path} (slide {slide_id}). HINT: give "
            "another folder, or take the file away."
        )


def _header(grid: TileGrid, slide_path: Path, quality: int) -> dict[str, Any]:
    """What a store is known by: another grid, slide file or quality is another store."""
    fingerprint = slide_fingerprint(slide_path)
    names = [field.name for field in fields(grid) if field.name not in ("coords", "policy", "source", "tissue")]
    return {
        "format": FORMAT,
        "version": VERSION,
        "n_tiles": len(grid),
        "coords_sha256": hashlib.sha256(np.ascontiguousarray(grid.coords, dtype="<i8").tobytes()).hexdigest(),
        "slide_bytes": fingerprint.n_bytes,
        FINGERPRINT: fingerprint.sha256,
        "quality": quality,
        "shrink": grid.policy.shrink,
        **{name: getattr(grid, name) for name in names},
    }


def store_problem(path: Path, grid: TileGrid, slide_path: Path, quality: int | None = None) -> str | None:
    """Why a file is not the whole store of this grid and slide, or None; tiles are not read.

    Args:
        path: the store's file.
        grid: the grid whose rows the store should hold.
        slide_path: the slide's file.
        quality: JPEG's, where it matters.
    """
    where = f"(slide {grid.slide_id}, {path}). {HINT}"
    if not path.is_file():
        return f"tile store must hold every slide, got no file {where}"
    try:
        with StoredSlide(path) as stored:
            header = stored.header
    except StoreError as error:
        return str(error)
    expected = _header(grid, slide_path, header["quality"] if quality is None else quality)
    for name, value in expected.items():
        if name == "version" or (name == FINGERPRINT and name not in header):
            continue  # of an earlier version: see `lacks_fingerprint`; to pack again takes long
        written = header.get(name, BOX) if name == "shrink" else header.get(name)  # earlier versions had one way
        if written != value:
            return f"tile store's {name} must be that of the cohort, {value}, got {written} {where}"
    return None


def lacks_fingerprint(path: Path) -> bool:
    """Whether a whole store's file was written by a version that knew its slide by the file's size alone."""
    with StoredSlide(path) as stored:
        return FINGERPRINT not in stored.header


class _Batch(NamedTuple):
    """The columns of a batch that are read."""

    jpegs: pa.Array
    crcs: np.ndarray
    reasons: pa.Array
    x: pa.Array
    y: pa.Array

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> "_Batch":
        jpegs, crcs, *others = (batch.column(name) for name in ("jpeg", "crc32", "reason", "x", "y"))
        return cls(jpegs, crcs.fill_null(0).to_numpy(), *others)


def _header_of(schema: pa.Schema) -> dict[str, Any]:
    """What the file says of itself; empty where it is no store's."""
    header = json.loads((schema.metadata or {}).get(b"ds_wsi", b"{}"))
    return header if isinstance(header, dict) and header.get("format") == FORMAT else {}


class StoredSlide:
    """The tiles of one slide in a store, memory-mapped.

    Raises:
        StoreError: a torn file, or one of another format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        where = f"({self.path}). {HINT}"
        self._batches: list[_Batch] = []
        self._starts: list[int] = []
        n_tiles = 0
        try:
            sealed = is_sealed(self.path)  # before Arrow sees it
            self._file = pa.memory_map(str(self.path))
            with pa.ipc.open_stream(self._file) as stream:
                self.header: dict[str, Any] = _header_of(stream.schema)
                is_known = self.header.get("version") == (VERSION if sealed else UNSEALED)
                if is_known and not stream.schema.equals(SCHEMA):
                    raise ValueError(f"columns {stream.schema.names} of other kinds")
                if is_known and not {*self.header} >= _NEEDED:
                    raise ValueError(f"a head without {', '.join(sorted(_NEEDED - {*self.header}))}")
                for batch in stream if is_known else ():
                    batch.validate(full=True)
                    self._batches.append(_Batch.of(batch))
                    self._starts.append(n_tiles)
                    n_tiles += len(batch)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise StoreError(f"tile store must be a whole Arrow file, got {error} {where}") from error
        if not is_known:
            raise StoreError(
                f"tile store must be of format {FORMAT} {UNSEALED} or {VERSION}, got another, or a file without its "
                f"end {where}"
            )
        if n_tiles != self.header["n_tiles"]:
            raise StoreError(f"tile store must hold {self.header['n_tiles']} tiles, got {n_tiles} {where}")

    def __enter__(self) -> "StoredSlide":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        return int(self.header["n_tiles"])

    @property
    def n_failed(self) -> int:
        """Tiles that could not be read from the slide."""
        return sum(batch.jpegs.null_count for batch in self._batches)

    def close(self) -> None:
        """Let the file go; tiles can no longer be read."""
        self._batches.clear()
        self._file.close()

    def jpeg(self, row: int) -> bytes:
        """The JPEG of a row of the grid.

        Raises:
            ValueError: the tile could not be packed, or the file was damaged since.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row must be in [0, {len(self)}), got {row} ({self.path})")
        batch, row = self._find(row)
        value = batch.jpegs[row]
        if not value.is_valid:
            raise ValueError(batch.reasons[row].as_py())
        jpeg = bytes(value.as_buffer())
        checksum = zlib.crc32(jpeg)
        if checksum != batch.crcs[row]:
            raise ValueError(f"CRC-32 must be {batch.crcs[row]:08x}, got {checksum:08x} ({self.path}). {HINT}")
        return jpeg

    def _find(self, row: int) -> "tuple[_Batch, int]":
        number = bisect_right(self._starts, row) - 1
        return self._batches[number], row - self._starts[number]

    def read_tile(self, row: int, out: np.ndarray) -> None:
        """Decode a row of the grid to `out`, uint8 [S, S, 3].

        Raises:
            TileReadError: as from the slide itself.
        """
        try:
            decode(self.jpeg(row), out.shape[1], out.shape[0], out=out)
        except (ValueError, NotDirectError) as error:
            batch, number = self._find(row)
            x, y = batch.x[number].as_py(), batch.y[number].as_py()
            raise TileReadError(str(self.header["slide_id"]), x, y, error) from error


def damaged_rows(path: str | Path) -> list[int]:
    """The rows of a store's file whose bytes are not those that were written: reads the whole file."""
    with StoredSlide(path) as stored:
        jpegs = (pair for batch in stored._batches for pair in zip(batch.jpegs, batch.crcs, strict=True))
        return [row for row, (jpeg, crc) in enumerate(jpegs) if jpeg.is_valid and zlib.crc32(jpeg.as_buffer()) != crc]


class TileStore:
    """A folder of packed slides, a bounded number of them open; pickles and forks as an empty one.

    Args:
        directory: the store's folder.
        max_open: files mapped at a time, the least recently used closed first.
    """

    def __init__(self, directory: str | Path, max_open: int = 64) -> None:
        self.directory, self.max_open = Path(directory), max_open
        self._open: OrderedDict[str, StoredSlide] = OrderedDict()

    def __reduce__(self) -> tuple[type, tuple[Path, int]]:
        return type(self), (self.directory, self.max_open)

    def get(self, slide_id: str) -> StoredSlide:
        """The packed slide, opened where it is not."""
        if slide_id not in self._open:
            self._open[slide_id] = StoredSlide(store_path(self.directory, slide_id))
        self._open.move_to_end(slide_id)
        while len(self._open) > self.max_open:
            self._open.popitem(last=False)[1].close()
        return self._open[slide_id]
