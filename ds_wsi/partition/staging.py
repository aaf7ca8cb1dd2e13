"""Host memory as an extension of the device's: tensors copied out and back on streams of their own.

One slab of pinned memory holds them (the caching pinned allocator rounds each up to a power of two). Copies out wait
for the computation that made the tensor; copies back are started ahead of their use. Without a GPU the same code runs
with plain memory and no streams, so that what is copied, and how many bytes, is the same everywhere.
"""

import weakref
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_wsi.runtime.log import logger
from ds_wsi.runtime.memory import host_allocation

_ALIGN = 256  # bytes; of every tensor in a slab
_SLAB = 2**22  # bytes; at least, of a slab that no plan reserved


_Block = tuple[int, int, int]  # slab, offset and length in bytes


@dataclass(eq=False)
class Ticket:
    """A tensor that lies in host memory."""

    place: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    block: _Block
    ready: Any = None
    fetched: Tensor | None = None
    arrived: Any = None
    released: bool = False
    owners: int = 1
    key: Any = None
    order: int = 0


class HostStore:
    """Tensors in host memory; the memory is kept from call to call, for pinning it takes long.

    Args:
        device: that the tensors come from and go back to.
        overlap: on streams of their own, from pinned memory.

    Attributes:
        held_bytes, peak_bytes: in host memory, now and at most.
        sent_bytes, fetched_bytes: over the link so far.
    """

    def __init__(self, device: torch.device, *, overlap: bool = True) -> None:
        self.device = device
        self.held_bytes = self.peak_bytes = self.sent_bytes = self.fetched_bytes = 0
        self._slabs: list[Tensor] = []
        self._free: list[_Block] = []  # sorted
        self._known: dict[Any, tuple[Ticket, weakref.ref]] = {}
        cuda = device.type == "cuda" and overlap
        self._host = device if device.type == "meta" else torch.device("cpu")
        self._out: Any = torch.cuda.Stream(device) if cuda else None
        self._back: Any = torch.cuda.Stream(device) if cuda else None
        self._pinned = cuda

    @property
    def capacity_bytes(self) -> int:
        """Host memory that the store has taken."""
        return sum(slab.numel() for slab in self._slabs)

    def reserve(self, size: int) -> None:
        """Take `size` bytes in one slab, unless they are there or in use."""
        if self.held_bytes == 0 and self.capacity_bytes < size:
            self._slabs, self._free = [], []
            self._grow(size)

    def put(self, tensor: Tensor) -> Ticket:
        """Start copying `tensor` out; the caller may drop it at once.

        A tensor that lies there already, unchanged since, is not copied again: the ticket has one more owner.
        """
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        key = storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version
        known = self._known.get(key)
        # An address is used again once its storage is freed: then the entry is another tensor's.
        if known is not None and known[1]() is storage and not known[0].released:
            known[0].owners += 1
            return known[0]
        if not tensor.is_contiguous() and not _is_dense(tensor):
            tensor = tensor.contiguous()
        size = tensor.numel() * tensor.element_size()
        flat = torch.as_strided(tensor, (tensor.numel(),), (1,), tensor.storage_offset())
        slab, offset, length = self._take(size)
        place = self._slabs[slab][offset : offset + size].view(tensor.dtype)
        ticket = Ticket(place, tensor.shape, tensor.stride(), (slab, offset, length))
        if self._out is None:
            with host_allocation():
                ticket.place.copy_(flat)
        else:
            self._out.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._out):
                ticket.place.copy_(flat, non_blocking=True)
                ticket.ready = self._out.record_event()
            flat.record_stream(self._out)
        self._known[key] = ticket, weakref.ref(storage)
        ticket.key = key
        self.sent_bytes += size
        self.held_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return ticket

    def prefetch(self, ticket: Ticket) -> None:
        """Start copying the tensor back."""
        if ticket.fetched is not None or ticket.released:
            return
        place = ticket.place
        if self._back is None:
            flat = torch.empty(place.shape, dtype=place.dtype, device=self.device)
            with host_allocation():
                flat.copy_(place)
        else:
            # Memory of the computing stream's pool: waits until the allocator's earlier users there are done.
            flat = torch.empty(place.shape, dtype=place.dtype, device=self.device)
            self._back.wait_stream(torch.cuda.current_stream(self.device))
            self._back.wait_event(ticket.ready)
            with torch.cuda.stream(self._back):
                flat.copy_(place, non_blocking=True)
                ticket.arrived = self._back.record_event()
            flat.record_stream(self._back)
        ticket.fetched = torch.as_strided(flat, ticket.shape, ticket.stride)
        self.fetched_bytes += place.numel() * place.element_size()

    def get(self, ticket: Ticket) -> Tensor:
        """The tensor on the device; the store keeps its copy until `release`."""
        self.prefetch(ticket)
        if ticket.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(ticket.arrived)
        tensor, ticket.fetched = ticket.fetched, None
        assert tensor is not None
        return tensor

    def release(self, ticket: Ticket) -> None:
        """Give up an owner's claim; with the last one the host memory goes to the next tensors."""
        ticket.owners -= 1
        if ticket.owners > 0 or ticket.released:
            return
        self._known.pop(ticket.key, None)
        ticket.released, ticket.fetched = True, None
        if ticket.ready is not None and not ticket.ready.query():
            ticket.ready.synchronize()
        if ticket.arrived is not None and not ticket.arrived.query():
            ticket.arrived.synchronize()
        self.held_bytes -= ticket.place.numel() * ticket.place.element_size()
        self._give_back(ticket.block)

    def _take(self, size: int) -> _Block:
        """Free memory of at least `size` bytes: the smallest free block, cut to size."""
        rounded = -(-max(size, 1) // _ALIGN) * _ALIGN
        fitting = [block for block in self._free if block[2] >= rounded]
        if not fitting:
            # An eighth more than is held, where a plan was short: pinned memory is dear.
            self._grow(max(rounded, _SLAB, self.held_bytes // 8))
            fitting = self._free[-1:]
        slab, offset, length = min(fitting, key=lambda block: block[2])
        self._free.remove((slab, offset, length))
        if length > rounded:
            insort(self._free, (slab, offset + rounded, length - rounded))
        return slab, offset, rounded

    def _give_back(self, block: _Block) -> None:
        """Free a block, joined with the free ones beside it."""
        slab, offset, length = block
        index = bisect_left(self._free, block)
        if index < len(self._free) and self._free[index][:2] == (slab, offset + length):
            length += self._free.pop(index)[2]
        if index and self._free[index - 1][0] == slab and sum(self._free[index - 1][1:]) == offset:
            _, offset, before = self._free.pop(index - 1)
            length += before
        insort(self._free, (slab, offset, length))

    def _grow(self, size: int) -> None:
        rounded = -(-size // _ALIGN) * _ALIGN
        with host_allocation():
            try:
                slab = torch.empty(rounded, dtype=torch.uint8, device=self._host, pin_memory=self._pinned)
            except RuntimeError as error:
                if not self._pinned:
                    raise
                logger.warning(
                    "host memory is pageable from here on, and copies do not overlap: pinning %.1f GiB failed (%s)",
                    rounded / 2**30,
                    str(error).splitlines()[0],
                )
                self._pinned = False
                slab = torch.empty(rounded, dtype=torch.uint8)
        self._slabs.append(slab)
        self._free.append((len(self._slabs) - 1, 0, rounded))


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or repeats, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
