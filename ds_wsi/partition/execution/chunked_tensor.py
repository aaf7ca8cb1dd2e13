"""A tensor that exists in chunks: tiles [first, last) or rows [first, last) of it at a time, on the device or host."""

from typing import Protocol

import torch
from torch import Tensor

from ds_wsi.partition.execution.host_store import HostStore
from ds_wsi.partition.execution.ticket import Ticket

Range = tuple[int, int]  # [first, last)


class ChunkedTensor(Protocol):
    """What a pass reads, and may drop, a chunk at a time: an input or output gradient, or a stored value."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was written: a gradient that does not flow."""

    def read(self, where: Range) -> Tensor:
        """A chunk on the device."""

    def prefetch(self, where: Range) -> None:
        """Start bringing a chunk to the device."""

    def drop(self, where: Range) -> None:
        """Forget a chunk that was read for the last time."""

    def clear(self) -> None:
        """Forget everything."""


class TileChunks:
    """Chunks of tiles as they were written, in order: nothing is copied where readers want the same chunks.

    Args:
        host: a store, for values kept in host memory; None keeps them on the device.
    """

    def __init__(self, host: HostStore | None = None) -> None:
        self.host = host
        self.parts: dict[Range, Tensor | Ticket] = {}

    def __del__(self) -> None:
        """A call that is dropped without its backward gives its host memory back."""
        for part in self.parts.values():
            if self.host is not None and isinstance(part, Ticket):
                self.host.drop(part)

    def write(self, where: Range, tensor: Tensor) -> None:
        """Keep a chunk."""
        self.parts[where] = tensor if self.host is None else self.host.put(tensor)

    def add(self, where: Range, tensor: Tensor) -> None:
        """Add to a chunk (a gradient's: from one more reader), or keep it as the first."""
        if where not in self.parts:
            self.write(where, tensor)
            return
        total = self._part(where) + tensor
        self.drop(where)
        self.write(where, total)

    def read(self, where: Range) -> Tensor:
        """The tiles on the device, joined from several chunks where they were written otherwise."""
        if where in self.parts:
            return self._part(where)
        pieces = []
        for first, last in sorted(self.parts):
            low, high = max(first, where[0]), min(last, where[1])
            if low < high:
                pieces.append(self._part((first, last)).narrow(0, low - first, high - low))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def prefetch(self, where: Range) -> None:
        """Start bringing a chunk back from host memory."""
        part = self.parts.get(where)
        if self.host is not None and isinstance(part, Ticket):
            self.host.prefetch(part)

    def drop(self, where: Range) -> None:
        """Forget the chunks that lie within `where`: they were read for the last time."""
        for key in [key for key in self.parts if where[0] <= key[0] and key[1] <= where[1]]:
            part = self.parts.pop(key)
            if self.host is not None and isinstance(part, Ticket):
                self.host.release(part)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was written, or all was dropped."""
        return not self.parts

    @property
    def device_bytes(self) -> int:
        """Bytes held on the device."""
        return sum(part.numel() * part.element_size() for part in self.parts.values() if isinstance(part, Tensor))

    def clear(self) -> None:
        """Forget everything."""
        for key in list(self.parts):
            self.drop(key)

    def whole(self) -> Tensor:
        """All tiles as one tensor on the device."""
        keys = sorted(self.parts)
        parts = [self._part(key) for key in keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _part(self, key: Range) -> Tensor:
        part = self.parts[key]
        if isinstance(part, Ticket):
            assert self.host is not None
            return self.host.get(part)
        return part


class RowBlocks:
    """Rows of images [B, C, H, W]; readers overlap, so it is one buffer on the device, or blocks in host memory.

    Args:
        height: rows of the whole.
        host: the same as in `TileChunks`.
    """

    def __init__(self, height: int, host: HostStore | None = None) -> None:
        self.height, self.host = height, host
        self.buffer: Tensor | None = None
        self.blocks = TileChunks(host)
        self.order: list[Range] = []

    def write(self, where: Range, tensor: Tensor) -> None:
        """Keep rows."""
        if where == (0, self.height) and self.host is None:
            self.buffer = tensor
        elif self.host is None:
            self._whole(tensor)[:, :, where[0] : where[1]] = tensor
        elif where[1] > where[0]:
            self.blocks.write(where, tensor)

    def add(self, where: Range, tensor: Tensor) -> None:
        """Add to rows, which are zero at first."""
        if where == (0, self.height) and self.host is None:
            # Not in place: autograd hands the same tensor to several readers.
            self.buffer = tensor if self.buffer is None else self.buffer + tensor
        elif self.host is None:
            self._whole(tensor)[:, :, where[0] : where[1]] += tensor
        else:
            self._add_to_blocks(where, tensor)

    def read(self, where: Range) -> Tensor:
        """The rows on the device."""
        first, last = where
        if self.host is None:
            assert self.buffer is not None
            return self.buffer[:, :, first:last]
        pieces: list[Tensor] = []
        at = first
        for low, high in sorted(self.blocks.parts):
            low_in, high_in = max(low, first), min(high, last)
            if low_in < high_in:
                block = self.blocks.read((low, high))
                if at < low_in:
                    pieces.append(_zero_rows(block, low_in - at))
                pieces.append(block[:, :, low_in - low : high_in - low])
                at = high_in
        if at < last or not pieces:  # a gradient's rows that nothing reads
            pieces.append(_zero_rows(self.blocks.read(min(self.blocks.parts)), last - at))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def prefetch(self, where: Range) -> None:
        """Start bringing blocks back from host memory."""
        for key in self.blocks.parts:
            if key[0] < where[1] and where[0] < key[1]:
                self.blocks.prefetch(key)

    def drop(self, where: Range) -> None:
        """Keep: neighbours overlap; `clear` frees."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was written."""
        return self.buffer is None and self.blocks.is_empty

    @property
    def device_bytes(self) -> int:
        """Bytes held on the device."""
        return 0 if self.buffer is None else self.buffer.numel() * self.buffer.element_size()

    def clear(self) -> None:
        """Forget everything."""
        self.buffer = None
        self.blocks.clear()

    def whole(self) -> Tensor:
        """All rows as one tensor on the device."""
        return self.read((0, self.height))

    def _whole(self, like: Tensor) -> Tensor:
        if self.buffer is None:
            shape = (*like.shape[:2], self.height, like.shape[3])
            self.buffer = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return self.buffer

    def _add_to_blocks(self, where: Range, tensor: Tensor) -> None:
        """Gradients in host memory: blocks that do not overlap; what is new lies before or after what is there."""
        first, last = where
        for low, high in sorted(self.blocks.parts):
            low_in, high_in = max(low, first), min(high, last)
            if low_in < high_in:
                block = self.blocks.read((low, high)).clone()
                block[:, :, low_in - low : high_in - low] += tensor[:, :, low_in - first : high_in - first]
                self.blocks.drop((low, high))
                self.blocks.write((low, high), block)
        covered = sorted((max(low, first), min(high, last)) for low, high in self.blocks.parts)
        at = first
        for low, high in [*(item for item in covered if item[0] < item[1]), (last, last)]:
            if at < low:
                self.blocks.write((at, low), tensor[:, :, at - first : low - first])
            at = max(at, high)


StoredTensor = TileChunks | RowBlocks


def _zero_rows(like: Tensor, count: int) -> Tensor:
    return like.new_zeros((*like.shape[:2], count, like.shape[3]))
