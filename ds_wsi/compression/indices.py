"""Codings of ascending indices below d, none with a loop over the indices.

[Note: index encodings]
    dense   no indices: nnz = d
    bitmap  bit i (least significant first) says that entry i is sent: ceil(d/8) bytes
    coo     u32 each: 4 nnz bytes
    gap     Elias-Fano. With a low width of l bits, gaps between the high parts (index >> l) are coded in unary: bit
            (index >> l) + i is set for the i-th index, in ceil((nnz + ((d-1) >> l)) / 8) bytes; before it come the low
            parts as l bit planes of ceil(nnz/8) bytes. About 2 + log2(d/nnz) bits an index, 8.6 at 1 %, and no loop
            over the indices on either side. l is the width of the smallest size: not sent, both sides compute it.
"""

import numpy as np

INDEX_ENCODINGS = ("dense", "bitmap", "gap", "coo")  # of equal sizes the first is chosen: the cheapest to decode


class WireError(ValueError):
    """A message that is torn, hostile, or not the one expected."""


def low_width(d: int, nnz: int) -> int:
    """The low width of the smallest gap coding, of equal ones the smallest."""
    return min(range(32), key=lambda width: _gap_bytes(d, nnz, width))


def _gap_bytes(d: int, nnz: int, width: int) -> int:
    return 0 if nnz == 0 else width * _bytes(nnz) + _bytes(nnz + ((d - 1) >> width))


def index_bytes(encoding: str, d: int, nnz: int) -> int:
    """Bytes of the indices of `nnz` of `d` entries."""
    if encoding == "gap":
        return _gap_bytes(d, nnz, low_width(d, nnz))
    return {"dense": 0, "bitmap": _bytes(d), "coo": 4 * nnz}[encoding]


def encode_indices(encoding: str, indices: np.ndarray, d: int) -> bytes:
    """Bytes of strictly ascending int64 `indices` below `d`."""
    if encoding == "coo":
        return indices.astype("<u4").tobytes()
    if encoding == "bitmap":
        return _pack(indices, d)
    if len(indices) == 0:
        return b""
    width, count = low_width(d, len(indices)), len(indices)
    planes = [_pack_bits(indices >> bit & 1) for bit in range(width)]
    high = (indices >> width) + np.arange(count)
    return b"".join([*planes, _pack(high, count + ((d - 1) >> width))])


def _pack(positions: np.ndarray, size: int) -> bytes:
    bits = np.zeros(size, np.uint8)
    bits[positions] = 1
    return _pack_bits(bits)


def _pack_bits(bits: np.ndarray) -> bytes:
    return np.packbits(bits.astype(np.uint8, copy=False), bitorder="little").tobytes()


def _unpack(data: np.ndarray, size: int) -> np.ndarray:
    """The first `size` bits; the rest of the last byte must be zero."""
    bits = np.unpackbits(data, bitorder="little")
    if bits[size:].any():
        raise WireError("bits after the last index must be zero")
    return bits[:size].view(np.bool_)


def ascending(indices: np.ndarray) -> bool:
    """Whether each index is above the one before."""
    return bool((indices[1:] > indices[:-1]).all())


def _bytes(bits: int) -> int:
    return (bits + 7) // 8


def decode_indices(encoding: str, data: np.ndarray, d: int, nnz: int) -> np.ndarray:
    """Read `encode_indices`' bytes, of `index_bytes` length: [nnz] int64, strictly ascending, below `d`.

    Raises:
        WireError: other bytes than `encode_indices` writes.
    """
    if encoding == "coo":
        indices = np.frombuffer(data.tobytes(), "<u4").astype(np.int64)
    elif encoding == "bitmap":
        indices = np.flatnonzero(_unpack(data, d))
    elif nnz == 0:
        indices = np.zeros(0, np.int64)
    else:
        indices = _decode_gaps(data, d, nnz)
    if len(indices) != nnz or (nnz and (indices[-1] >= d or not ascending(indices))):
        raise WireError(f"indices must be {nnz}, ascending strictly, below {d}")
    return indices


def _decode_gaps(data: np.ndarray, d: int, nnz: int) -> np.ndarray:
    width, plane_bytes = low_width(d, nnz), _bytes(nnz)
    high = np.flatnonzero(_unpack(data[width * plane_bytes :], nnz + ((d - 1) >> width)))
    if len(high) != nnz:
        raise WireError(f"indices must be {nnz}, got {len(high)}")
    indices = (high - np.arange(nnz)) << width
    for bit in range(width):
        plane = _unpack(data[bit * plane_bytes : (bit + 1) * plane_bytes], nnz)
        indices |= plane.astype(np.int64) << bit
    return indices
