"""The seal of a tile store's file: a checksum, behind the Arrow stream, of everything but the JPEGs.

Arrow trusts what a file says of itself: one flipped byte among the offsets ends the process. So the seal is checked
before Arrow sees the file. It costs little, because it covers some 30 bytes per tile; each JPEG has its own CRC-32,
inside the sealed part. Arrow's readers stop at the end of the stream, and do not see it:

    (start, stop) of each stretch of JPEGs     2 x uint64 each
    CRC-32                                     uint32, of the bytes outside the stretches, and of the stretches
    number of stretches                        uint64
    b"ds_wsi/2"
"""

import mmap
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

MAGIC = b"ds_wsi/2"
_STRETCH, _END = struct.Struct("<QQ"), struct.Struct("<IQ8s")


class SealError(ValueError):
    """A sealed file that is not what was written."""


def seal(path: Path, column: str) -> None:
    """Append the seal to an Arrow stream of which one binary column is checked apart."""
    with pa.memory_map(str(path)) as file:
        base = file.read_buffer().address
        file.seek(0)
        stretches = []
        with pa.ipc.open_stream(file) as stream:
            for batch in stream:
                data = batch.column(column).buffers()[2]
                if data is not None and data.size:
                    stretches.append((data.address - base, data.address - base + data.size))
    packed = b"".join(_STRETCH.pack(*stretch) for stretch in stretches)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        checksum = _checksum(data, len(data), stretches, packed)
        file.seek(0, 2)
        file.write(packed + _END.pack(checksum, len(stretches), MAGIC))


def is_sealed(path: Path) -> bool:
    """Whether a file ends with a seal, and is what was sealed, but for the JPEGs; False: it has none.

    Raises:
        SealError: it is not.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        n_bytes = file.seek(0, 2)
        if n_bytes < _END.size:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            checksum, count, magic = _END.unpack(data[-_END.size :])
            if magic != MAGIC:
                return False
            end = n_bytes - _END.size - count * _STRETCH.size
            packed = data[max(end, 0) : n_bytes - _END.size]
            stretches = list(_STRETCH.iter_unpack(packed)) if end >= 0 else []
            edges = [0, *(edge for stretch in stretches for edge in stretch), end]
            if end < 0 or edges != sorted(edges):
                raise SealError("a damaged seal")
            actual = _checksum(data, end, stretches, packed)
    if actual != checksum:
        raise SealError(f"CRC-32 {actual:08x}, where {checksum:08x} was written")
    return True


def _checksum(data: mmap.mmap, end: int, stretches: Sequence[tuple[int, int]], packed: bytes) -> int:
    checksum, start = 0, 0
    with memoryview(data) as view:
        for stop, following in [*stretches, (end, end)]:
            with view[start:stop] as part:
                checksum = zlib.crc32(part, checksum)
            start = following
    return zlib.crc32(packed, checksum)
