"""Checksums in our own safetensors files, which have none: a changed byte of the data would be read in silence.

Two, as text in the metadata: one of the metadata, for who reads the head alone, and one of the tensors. Files of
earlier versions have neither, and are read as they are.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

OF_HEAD, OF_TENSORS = "crc32_of_head", "crc32_of_tensors"


class SealError(ValueError):
    """A file that is not what was written."""


def sealed(metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The metadata with both checksums."""
    head = {**metadata, OF_TENSORS: _of_tensors(tensors)}
    return {**head, OF_HEAD: _of_head(head)}


def opened(metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray] | None = None) -> dict[str, str]:
    """The metadata without its checksums, checked; and the tensors, where they were read.

    Raises:
        SealError: a checksum is another.
    """
    content = dict(metadata)
    head = content.pop(OF_HEAD, None)
    if (head is not None or OF_TENSORS in content) and head != _of_head(content):
        raise SealError(f"a head of CRC-32 {_of_head(content)}, where {head} was written")
    data = content.pop(OF_TENSORS, None)
    if data is not None and tensors is not None and data != _of_tensors(tensors):
        raise SealError(f"tensors of CRC-32 {_of_tensors(tensors)}, where {data} was written")
    return content


def in_order(path: Path) -> None:
    """Sort the metadata in the head of a safetensors file that was just written.

    The library writes it in an order that changes from process to process; the same content is then the same bytes.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        head = json.loads(file.read(length))
        head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
        text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > length:  # another way to escape a character: the order stays as it was written
            return
        file.seek(8)
        file.write(text.ljust(length))


def _of_head(metadata: Mapping[str, str]) -> str:
    return f"{zlib.crc32(json.dumps(sorted(metadata.items())).encode()):08x}"


def _of_tensors(tensors: Mapping[str, np.ndarray]) -> str:
    checksum = 0
    for name, values in sorted(tensors.items()):
        checksum = zlib.crc32(json.dumps([name, str(values.dtype), list(values.shape)]).encode(), checksum)
        whole: Any = np.ascontiguousarray(values).reshape(-1).view(np.uint8)  # numpy does not say that it is a buffer
        checksum = zlib.crc32(whole, checksum)
    return f"{checksum:08x}"
