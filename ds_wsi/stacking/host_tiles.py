"""A stack's tiles in host memory, which reach the device a chunk at a time and are changed there."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ds_wsi.runtime.pinned import PageLocked, locked_or_none

Change = Callable[[Tensor], Tensor]  # of some tiles of one bag: a tile's result does not depend on the others


class HostTiles:
    """Takes the place of a stack's values where the encoder reads chunks: 41,000 tiles of 256 px are 8 GB.

    It is no tensor, so that engines, which move a module's tensors to the device, leave it where it is.

    Args:
        tiles: uint8 [sum N, 3, S, S] on the host, page-locked where copies shall run ahead.
        lengths: tiles of each bag.
        changes: what changes each bag's tiles (augmentation), on the device; None changes nothing.
    """

    def __init__(self, tiles: Tensor, lengths: Sequence[int], changes: Sequence[Change] | None = None) -> None:
        self.tiles, self.ends, self.changes = tiles, list(accumulate(lengths)), changes
        if len(tiles) != (self.ends or [0])[-1]:
            raise ValueError(f"lengths must sum to the number of tiles, {len(tiles)}, got {list(lengths)}")

    def __len__(self) -> int:
        """Tiles."""
        return len(self.tiles)

    def __getitem__(self, rows: slice) -> "HostTiles":
        """Some tiles [first, last) of the stack."""
        first, last, _ = rows.indices(len(self))
        ends = [min(max(end, first), last) - first for end in self.ends]
        return HostTiles(self.tiles[first:last], [b - a for a, b in zip([0, *ends], ends, strict=False)], self.changes)

    def dim(self) -> int:
        """The number of dimensions, as a tensor has it."""
        return self.tiles.dim()

    def change(self, part: Tensor, first: int) -> Tensor:
        """What the bags' changes make of the tiles from `first` on, which lie on the device."""
        if self.changes is None:
            return part
        last, start, pieces = first + len(part), 0, []
        for end, change in zip(self.ends, self.changes, strict=True):
            low, high = max(start, first), min(end, last)
            if low < high:
                pieces.append(change(part[low - first : high - first]))
            start = end
        return part if not pieces else pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class PreparedTiles:
    """What a partition does with each chunk of a `HostTiles`: the bags' changes, then the model's normalising.

    Args:
        tiles: the stack.
        normalise: normalises tiles that were changed.
    """

    def __init__(self, tiles: HostTiles, normalise: Change) -> None:
        self.tiles, self.normalise = tiles, normalise

    def __call__(self, part: Tensor) -> Tensor:
        """The first tiles, prepared."""
        return self.at(part, 0)

    def at(self, part: Tensor, first: int) -> Tensor:
        """The tiles from `first` on, prepared."""
        return self.normalise(self.tiles.change(part, first))


class HostStacks:
    """Lays bags into host memory that the device copies from by itself; on a CPU they stay where they are.

    Two buffers take turns, so that a stack can be laid while the one before it is copied. Where the driver locks no
    memory they are pageable, and copies from them wait.

    Args:
        device: the device that the tiles go to.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[Tensor | None] = [None, None]
        self._locked: list[PageLocked | None] = [None, None]
        self._lock_pages = self.lays_anew
        self._used: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    @property
    def lays_anew(self) -> bool:
        """Whether there is a device that copies from a stack, in memory of our own."""
        return self.device.type == "cuda"

    def lay(self, bags: Sequence[Tensor]) -> Tensor:
        """The bags' tiles [N_b, 3, S, S] as one tensor [sum N, 3, S, S] with the first bag's order of memory."""
        if not self.lays_anew:
            return bags[0] if len(bags) == 1 else torch.cat(list(bags))
        self._turn = 1 - self._turn
        used = self._used[self._turn]
        if used is not None:
            used.synchronize()  # of the micro-step before the last
        first, count = bags[0], sum(map(len, bags))
        stack = _like(first, count, self._bytes(first.shape[1:].numel() * first.element_size() * count))
        row = 0
        for bag in bags:
            stack[row : row + len(bag)].copy_(bag)
            row += len(bag)
        return stack

    def used(self) -> None:
        """Say that the last stack's backward has been queued: it may be overwritten once that is done."""
        if self.lays_anew:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
            self._used[self._turn] = event

    def _bytes(self, size: int) -> Tensor:
        buffer = self._buffers[self._turn]
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[self._turn] = None  # or the old memory would be held beside the new
            locked, self._locked[self._turn] = self._locked[self._turn], None
            if locked is not None:
                locked.close()
            del locked
            buffer = self._buffers[self._turn] = self._allocated(size)
        return buffer[:size]

    def _allocated(self, size: int) -> Tensor:
        locked = locked_or_none(size, self.device) if self._lock_pages else None
        self._locked[self._turn] = locked
        self._lock_pages = locked is not None
        return torch.empty(size, dtype=torch.uint8) if locked is None else locked.data


def _like(bag: Tensor, count: int, memory: Tensor) -> Tensor:
    """A tensor of `count` tiles in this memory, each with its values in the order of the bag's."""
    order = sorted(range(1, bag.dim()), key=lambda dim: bag.stride(dim), reverse=True)
    shape = [count, *(bag.shape[dim] for dim in order)]
    back = [0, *(1 + order.index(dim) for dim in range(1, bag.dim()))]
    return memory.view(bag.dtype).view(shape).permute(back)
