"""Files of named tensors: written without holding the interpreter, and read without running what a stranger wrote.

The format is safetensors. Its own writer keeps the interpreter's lock until the last byte is written, which would stop
the training beside it; this one gives it up for each piece, and knows the file's SHA-256 when it is done.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ds_wsi.runtime.files import require_file

PIECE_BYTES = 2**24
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def of_rank(kind: str, rank: int, world: int) -> str:
    """The name of a process's own file of this kind."""
    return f"{kind}-{rank:05}-of-{world:05}.safetensors"


class Written(NamedTuple):
    """What is known of a file that was written: its length and SHA-256."""

    bytes: int
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Written:
    """Write CPU tensors to `path`, which must not be there, and flush them to the disk: the same bytes each time.

    Args:
        path: where to.
        tensors: name -> tensor, on the CPU.
        metadata: name -> text, in the file's head.

    Raises:
        ValueError: a dtype that the format has no name for.
        OSError: the file cannot be written.
    """
    # The largest items first, so that each tensor lies at a multiple of its item's size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise ValueError(f"a tensor of a file must have one of {len(_NAMES)} dtypes, got {tensor.dtype} ({name})")
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, length = hashlib.sha256(), 0
    with path.open("xb") as file:
        for piece in _pieces(text, [tensors[name] for name in order]):
            file.write(piece)
            digest.update(piece)
            length += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return Written(length, digest.hexdigest())


def _pieces(header: bytes, tensors: list[Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors:
        whole: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        content = memoryview(whole)
        for start in range(0, len(content), PIECE_BYTES):
            yield content[start : start + PIECE_BYTES]


class TensorFile:
    """The tensors of an open file, each read when it is asked for; `names` are all there are."""

    def __init__(self, opened: Any, path: Path) -> None:
        self._opened, self.path = opened, path
        self.names: frozenset[str] = frozenset(opened.keys())

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU, in memory of its own."""
        tensor: Tensor = self._opened.get_tensor(name)
        return tensor

    def read_like(self, name: str, target: Tensor, shape: torch.Size | None = None) -> Tensor:
        """A tensor that must have the shape of `target`, or the given one: a file is not trusted to fit.

        Raises:
            ValueError: another shape.
        """
        tensor, expected = self.read(name), target.shape if shape is None else shape
        if tensor.shape != expected:
            raise ValueError(
                f"{name} of {self.path} must have the shape {tuple(expected)}, got {tuple(tensor.shape)}. "
                "HINT: the file is of another model."
            )
        return tensor


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a file of tensors, and nothing else: no content of it is run.

    Raises:
        ValueError: the file is missing, or is not safetensors.
    """
    try:
        require_file(path)
        with safe_open(path, "pt") as opened:
            yield TensorFile(opened, path)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} must be a safetensors file, got another or none ({error})") from error
