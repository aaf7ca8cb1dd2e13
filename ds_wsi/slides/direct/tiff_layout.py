"""The directories of a TIFF as they stand in the file: classic and BigTIFF, of both byte orders.

A parser of its own, because it must be stricter than those that repair files: what libtiff reads in its own way is
refused here, and OpenSlide reads it. It also keeps the places of 100,000 tiles in 1.6 MB, and no open file.
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ds_wsi.slides.direct.errors import NotDirectError

CLASSIC, BIG = 42, 43  # the number that a header names its version with
# NumPy's kinds of the TIFF types that hold unsigned integers: BYTE, SHORT, LONG, LONG8.
INTEGERS = {1: "u1", 3: "u2", 4: "u4", 16: "u8"}
BYTES_PER_VALUE = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
Identity = tuple[int, int, int, int, int]  # device, inode, bytes, times of change
MAX_DIRECTORIES = 1000
MAX_ENTRIES = 4096  # of a directory


def identity_of(status: os.stat_result) -> Identity:
    """What tells a file's content from that of another file, or of another time; no two files of a system have one."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class SlideFile:
    """A file that is read by place; what threads and forked processes read does not move a position that they share.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be opened.
    """

    _descriptor: int | None = None  # of an object whose file could not be opened, which Python closes too

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.n_bytes = os.fstat(self._descriptor).st_size

    def __del__(self) -> None:
        self.close()

    @property
    def identity(self) -> Identity:
        """The file's identity; see `identity_of`.

        Raises:
            NotDirectError: it is closed.
        """
        if self._descriptor is None:
            raise NotDirectError("file must be open, got a closed one")
        return identity_of(os.fstat(self._descriptor))

    def close(self) -> None:
        """Let the file go; a later read raises."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def read(self, offset: int, n_bytes: int) -> bytes:
        """`n_bytes` bytes from `offset`.

        Raises:
            NotDirectError: the file has no such bytes, or is closed.
        """
        if self._descriptor is None:
            raise NotDirectError("file must be open, got a closed one")
        # Before the system sees the numbers: a damaged count could ask for more memory than there is.
        if offset + n_bytes <= self.n_bytes:
            try:
                data = os.pread(self._descriptor, n_bytes, offset)
            except OSError as error:  # OpenSlide may have better luck
                raise NotDirectError(f"file must be readable at byte {offset}, got {error}") from error
            if len(data) == n_bytes:
                return data
        raise NotDirectError(f"file must hold bytes {offset} to {offset + n_bytes}, got {self.n_bytes} bytes")


@dataclass(frozen=True)
class Entry:
    """One tag's values, not read yet.

    Attributes:
        kind: the TIFF type.
        count: how many values.
        offset: their place in the file.
    """

    kind: int
    count: int
    offset: int


class Directory:
    """One image of a TIFF, by its tags.

    Args:
        file: open; the values are read from it when they are asked for.
        number: the place in the chain of directories, from 0.
        entries: each tag's values.
        order: the byte order, "<" or ">".
    """

    def __init__(self, file: SlideFile, number: int, entries: Mapping[int, Entry], order: str) -> None:
        self.number = number
        self._file, self._entries, self._order = file, entries, order

    def __contains__(self, tag: int) -> bool:
        return tag in self._entries

    def integers(self, tag: int) -> np.ndarray:
        """The values of a tag, int64 [count].

        Raises:
            NotDirectError: the tag is missing, of another type, or not whole in the file.
        """
        entry = self._entry(tag)
        if entry.kind not in INTEGERS:
            raise NotDirectError(f"tag {tag} must hold integers, got TIFF type {entry.kind} ({self._where})")
        values = np.frombuffer(self._bytes(entry), dtype=self._order + INTEGERS[entry.kind])
        if entry.kind == 16 and values.size and int(values.max()) > 2**62:
            raise NotDirectError(f"tag {tag} must hold places in the file, got {int(values.max())} ({self._where})")
        return values.astype(np.int64)

    def integer(self, tag: int, default: int | None = None) -> int:
        """The one value of a tag, or `default` where the tag is missing.

        Raises:
            NotDirectError: it has no value, or several.
        """
        if default is not None and tag not in self:
            return default
        values = self.integers(tag)
        if values.size != 1:
            raise NotDirectError(f"tag {tag} must hold one value, got {values.size} ({self._where})")
        return int(values[0])

    def raw(self, tag: int) -> bytes:
        """The bytes of a tag of type ASCII, BYTE or UNDEFINED.

        Raises:
            NotDirectError: the tag is missing, of another type, or not whole in the file.
        """
        entry = self._entry(tag)
        if BYTES_PER_VALUE[entry.kind] != 1:
            raise NotDirectError(f"tag {tag} must hold bytes, got TIFF type {entry.kind} ({self._where})")
        return self._bytes(entry)

    @property
    def _where(self) -> str:
        return f"directory {self.number}"

    def _entry(self, tag: int) -> Entry:
        if tag not in self._entries:
            raise NotDirectError(f"{self._where} must have tag {tag}, got none")
        return self._entries[tag]

    def _bytes(self, entry: Entry) -> bytes:
        return self._file.read(entry.offset, entry.count * BYTES_PER_VALUE[entry.kind])


def read_directories(file: SlideFile) -> list[Directory]:
    """The chain of directories, without those that tags refer to.

    Raises:
        NotDirectError: no TIFF, a torn one, or a chain in a circle.
    """
    head = file.read(0, 8)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    version = struct.unpack(f"{order}H", head[2:4])[0] if order else 0
    if order is None or version not in (CLASSIC, BIG):
        raise NotDirectError("file must be a TIFF, got another format")
    reader = _ChainReader(file, order, big=version == BIG)
    offset = reader.first()
    directories: list[Directory] = []
    passed: set[int] = set()
    while offset:
        if offset in passed or len(directories) == MAX_DIRECTORIES:
            raise NotDirectError(f"TIFF must have at most {MAX_DIRECTORIES} directories, got a circle or more of them")
        passed.add(offset)
        entries, offset = reader.directory(offset, len(directories))
        directories.append(Directory(file, len(directories), entries, order))
    if not directories:
        raise NotDirectError("TIFF must have a directory, got none")
    return directories


class _ChainReader:
    """Parses directories of one of the two sizes of TIFF.

    Args:
        file: open.
        order: the byte order, "<" or ">".
        big: whether it is a BigTIFF, whose numbers and places have 8 bytes.
    """

    def __init__(self, file: SlideFile, order: str, big: bool) -> None:
        self._file, self._order, self._big = file, order, big
        self._place = f"{order}Q" if big else f"{order}I"
        self._place_bytes = 8 if big else 4

    def first(self) -> int:
        """The place of the first directory."""
        if not self._big:
            return self._number(self._place, 4)
        if self._file.read(4, 4) != struct.pack(f"{self._order}HH", 8, 0):
            raise NotDirectError("BigTIFF must have places of 8 bytes, got others")
        return self._number(self._place, 8)

    def directory(self, offset: int, number: int) -> tuple[dict[int, Entry], int]:
        """The entries at a place, and the place of the next directory or 0."""
        n_entries = self._number(f"{self._order}Q" if self._big else f"{self._order}H", offset)
        if not 1 <= n_entries <= MAX_ENTRIES:
            raise NotDirectError(f"directory {number} must have 1 to {MAX_ENTRIES} entries, got {n_entries}")
        start = offset + (8 if self._big else 2)
        step = 4 + 2 * self._place_bytes
        table = self._file.read(start, n_entries * step)
        entries: dict[int, Entry] = {}
        count_kind = self._place[1]
        for index in range(n_entries):
            tag, kind, count = struct.unpack_from(f"{self._order}HH{count_kind}", table, index * step)
            if tag in entries:
                raise NotDirectError(f"directory {number} must have each tag once, got tag {tag} twice")
            if kind not in BYTES_PER_VALUE:
                continue  # as libtiff: a type of later versions hides its tag alone
            value_offset = start + index * step + 4 + self._place_bytes
            if count * BYTES_PER_VALUE[kind] > self._place_bytes:
                value_offset = struct.unpack_from(self._place, table, index * step + 4 + self._place_bytes)[0]
            entries[tag] = Entry(kind, count, value_offset)
        return entries, self._number(self._place, start + n_entries * step)

    def _number(self, kind: str, offset: int) -> int:
        return int(struct.unpack(kind, self._file.read(offset, struct.calcsize(kind)))[0])
