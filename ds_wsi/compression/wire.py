"""The wire format: what one rank sends to another in one step, all tensors in one message.

[Note: layout]
Little-endian; a header of 40 bytes, a table of 24 bytes per entry, then the payloads in the table's order:

    header  magic "DWGC", version u16, flags u16, step u64, source rank u32, shard u32, entries u32,
            checksum u32 (crc32 of the whole message with this field zero), bytes after the header u64
    entry   tensor id u32, index encoding u8, value encoding u8, zero u16, d u32, nnz u32, payload bytes u64
    payload the indices, then nnz values

The index encodings are in [Note: index encodings] (indices.py). Sizes follow from (d, nnz) alone, so a decoder knows
every length before it allocates anything. A decoder that gets hostile bytes raises `WireError`; it takes
at most about 64 bytes of memory a byte received.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ds_wsi.compression.indices import (
    INDEX_ENCODINGS,
    WireError,
    ascending,
    decode_indices,
    encode_indices,
    index_bytes,
)

MAGIC = b"DWGC"
VERSION = 1
HEADER = struct.Struct("<4sHHQIIIIQ")
CHECKSUM_AT = 28
ENTRY = np.dtype(
    [
        ("id", "<u4"),
        ("index", "u1"),
        ("value", "u1"),
        ("zero", "<u2"),
        ("d", "<u4"),
        ("nnz", "<u4"),
        ("length", "<u8"),
    ]
)
MAX_NUMEL = 2**32 - 1
ABSOLUTE = 1  # flag: the values replace what the receiver has; else they are added
KNOWN_FLAGS = ABSOLUTE

VALUE_ENCODINGS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_VALUES = tuple(VALUE_ENCODINGS)


@dataclass(frozen=True)
class Section:
    """One tensor's entries in a message.

    Attributes:
        id: the tensor's number in the layout that sender and receiver share.
        numel: d, of the tensor.
        indices: [nnz] int64, strictly ascending; None: all d.
        values: [nnz] float32.
    """

    id: int
    numel: int
    indices: Tensor | None
    values: Tensor


@dataclass(frozen=True)
class Message:
    """What `decode` returns; tensors on the CPU."""

    step: int
    source: int
    shard: int
    flags: int
    sections: tuple[Section, ...]


def section_bytes(encoding: str, values: str, d: int, nnz: int) -> int:
    """Bytes of one tensor's payload, indices and values."""
    return index_bytes(encoding, d, nnz) + VALUE_ENCODINGS[values].itemsize * (d if encoding == "dense" else nnz)


def cheapest(values: str, d: int, nnz: int) -> str:
    """The index encoding of the smallest payload."""
    return min(INDEX_ENCODINGS, key=lambda encoding: section_bytes(encoding, values, d, nnz))


def message_bytes(payloads: Sequence[int]) -> int:
    """Bytes of a message from those of its payloads."""
    return HEADER.size + len(payloads) * ENTRY.itemsize + sum(payloads)


def round_values(values: Tensor, encoding: str) -> Tensor:
    """What a receiver decodes of float32 `values`: rounded to nearest, and saturated, not infinite, where too large."""
    if encoding == "fp32":
        return values
    return _narrow(values, encoding).float()


def _narrow(values: Tensor, encoding: str) -> Tensor:
    dtype = VALUE_ENCODINGS[encoding]
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)  # NaN passes through


def encode(
    sections: Sequence[Section],
    *,
    step: int,
    source: int = 0,
    shard: int = 0,
    flags: int = 0,
    values: str = "fp32",
    indices: str = "auto",
) -> Tensor:
    """One message of `sections`.

    Args:
        values: "fp32", "fp16" or "bf16" (`round_values`).
        indices: an encoding for all sections, or "auto": the cheapest of each.

    Returns:
        uint8 on the CPU, of `message_bytes` length.

    Raises:
        ValueError: indices that are not strictly ascending within the tensor, values that are not finite or not one an
            index, a tensor too large for the format.
    """
    table = np.zeros(len(sections), ENTRY)
    payloads: list[bytes | np.ndarray] = []
    for row, section in enumerate(sections):
        d = section.numel
        given = None if section.indices is None else section.indices.numpy(force=True)
        _check(section, given)
        chosen = cheapest(values, d, len(section.values)) if indices == "auto" else indices
        numbers = section.values.detach().cpu()
        if chosen == "dense" and given is not None:
            numbers = torch.zeros(d).index_copy_(0, torch.from_numpy(given), numbers)
        elif chosen != "dense" and given is None:
            given = np.arange(d)
        part = b"" if chosen == "dense" or given is None else encode_indices(chosen, given, d)
        raw = _narrow(numbers, values) if values != "fp32" else numbers.contiguous()
        payloads += [part, raw.view(torch.uint8).numpy()]
        encodings = INDEX_ENCODINGS.index(chosen), _VALUES.index(values)
        table[row] = (section.id, *encodings, 0, d, len(numbers), len(part) + len(payloads[-1]))
    return _seal(table, payloads, (step, source, shard), flags)


def _check(section: Section, indices: np.ndarray | None) -> None:
    d, count = section.numel, len(section.values)
    where = f"(tensor {section.id})"
    if not 0 <= d <= MAX_NUMEL:
        raise ValueError(f"a tensor must have at most {MAX_NUMEL} entries, got {d} {where}. HINT: send it in parts")
    if count != (d if indices is None else len(indices)):
        raise ValueError(f"values must be one an index, got {count} of a tensor of {d} {where}")
    if indices is not None and count and not (indices[0] >= 0 and indices[-1] < d and ascending(indices)):
        raise ValueError(f"indices must ascend strictly within 0..{d - 1} {where}")
    if not torch.isfinite(section.values).all():
        raise ValueError(f"values must be finite {where}. HINT: discard the step on overflow")


def _seal(table: np.ndarray, payloads: Sequence[bytes | np.ndarray], ids: tuple[int, int, int], flags: int) -> Tensor:
    """Header, table and payloads in one buffer, with the checksum."""
    length = table.nbytes + sum(len(part) for part in payloads)
    message = np.empty(HEADER.size + length, np.uint8)
    step, source, shard = ids
    header = HEADER.pack(MAGIC, VERSION, flags, step, source, shard, len(table), 0, length)
    message[: HEADER.size] = np.frombuffer(header, np.uint8)
    at = HEADER.size
    for part in (table.tobytes(), *payloads):
        message[at : at + len(part)] = np.frombuffer(part, np.uint8) if isinstance(part, bytes) else part
        at += len(part)
    return torch.from_numpy(reseal(message))


def reseal(message: np.ndarray) -> np.ndarray:
    """Put the right checksum into a message, in place."""
    field = message[CHECKSUM_AT : CHECKSUM_AT + 4]
    field[:] = 0
    field[:] = np.frombuffer(struct.pack("<I", zlib.crc32(message.data)), np.uint8)
    return message


def decode(message: Tensor, *, layout: Sequence[tuple[int, int]] | None = None, step: int | None = None) -> Message:
    """Read a message.

    Args:
        message: [n] uint8, any device. Not kept: the returned tensors are copies.
        layout: the (tensor id, d) the message must hold, in order; None: any. Give it wherever d sizes an allocation.
        step: the step it must be of; None: any.

    Raises:
        WireError: anything that `encode` would not have written, or another layout or step.
    """
    if message.dtype != torch.uint8 or message.dim() != 1:
        raise WireError(f"a message must be 1-D uint8, got {message.dim()}-D {message.dtype}")
    data = np.ascontiguousarray(message.numpy(force=True))
    ids, flags, table = _read_header(data, layout)
    if step is not None and ids[0] != step:
        raise WireError(f"a message must be of step {step}, got {ids[0]} (rank {ids[1]})")
    at, sections = HEADER.size + table.nbytes, []
    for row in table:
        end = at + int(row["length"])
        sections.append(_read_section(row, data[at:end]))
        at = end
    return Message(*ids, flags, tuple(sections))


def _read_header(
    data: np.ndarray, layout: Sequence[tuple[int, int]] | None
) -> tuple[tuple[int, int, int], int, np.ndarray]:
    """(step, source, shard), flags, table; every length is checked against the bytes that are there."""
    if len(data) < HEADER.size:
        raise WireError(f"a message must have a header of {HEADER.size} bytes, got {len(data)}")
    magic, version, flags, step, source, shard, count, checksum, length = HEADER.unpack(data[: HEADER.size].tobytes())
    if magic != MAGIC or version != VERSION or flags & ~KNOWN_FLAGS:
        raise WireError(f"a message must begin {MAGIC!r}, version {VERSION}, got {magic!r}, {version}, flags {flags}")
    if length != len(data) - HEADER.size or count * ENTRY.itemsize > length:
        raise WireError(f"a message must have the {length} bytes, {count} entries, it announces, got {len(data)} bytes")
    head = bytearray(data[: HEADER.size].tobytes())
    head[CHECKSUM_AT : CHECKSUM_AT + 4] = bytes(4)
    if zlib.crc32(data[HEADER.size :].data, zlib.crc32(head)) != checksum:
        raise WireError("a message must match its checksum")
    table = np.frombuffer(data, ENTRY, count, HEADER.size)
    if layout is not None and list(zip(table["id"].tolist(), table["d"].tolist())) != list(layout):
        raise WireError(f"a message must hold the {len(layout)} tensors that both ranks know, in order and size")
    if len(np.unique(table["id"])) != count:
        raise WireError("a message must hold a tensor once")
    # In Python's integers: a sum of hostile lengths does not wrap.
    if sum(_payload_bytes(row) for row in table) != length - table.nbytes:
        raise WireError("a message must have the payload bytes that its table announces")
    return (step, source, shard), flags, table


def _payload_bytes(row: np.ndarray) -> int:
    index, value, d, nnz = (int(row[name]) for name in ("index", "value", "d", "nnz"))
    if index >= len(INDEX_ENCODINGS) or value >= len(_VALUES) or row["zero"]:
        raise WireError(f"an entry's encodings must be known, got {index}, {value}, {int(row['zero'])}")
    if nnz > d or (INDEX_ENCODINGS[index] == "dense" and nnz != d):
        raise WireError(f"an entry must send 0..d of its d values, a dense one all, got {nnz} of {d}")
    if int(row["length"]) != section_bytes(INDEX_ENCODINGS[index], _VALUES[value], d, nnz):
        raise WireError(f"an entry's payload must have the length of its encoding, got {int(row['length'])} bytes")
    return int(row["length"])


def _read_section(row: np.ndarray, payload: np.ndarray) -> Section:
    encoding, d, nnz = INDEX_ENCODINGS[row["index"]], int(row["d"]), int(row["nnz"])
    split = index_bytes(encoding, d, nnz)
    raw = torch.empty(nnz, dtype=VALUE_ENCODINGS[_VALUES[row["value"]]])
    # A copy, because the payload may begin anywhere and torch reads aligned.
    raw.view(torch.uint8).copy_(torch.from_numpy(payload[split:]))
    if not torch.isfinite(raw).all():
        raise WireError(f"values must be finite (tensor {int(row['id'])})")
    indices = None if encoding == "dense" else torch.from_numpy(decode_indices(encoding, payload[:split], d, nnz))
    return Section(int(row["id"]), d, indices, raw.float())
