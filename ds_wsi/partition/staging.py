"""Host memory as an extension of the device's: tensors copied out and back on streams of their own.

One slab of pinned memory holds them (the caching pinned allocator rounds each up to a power of two). Copies out wait
for the computation that made the tensor; copies back are started ahead of their use. Without a GPU the same code runs
with plain memory and no streams, so that what is copied, and how many bytes, is the same everywhere.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_wsi.runtime.log import logger
from ds_wsi.runtime.memory import host_allocation

_ALIGN = 256  # bytes; of every tensor in a slab
_SLAB = 2**22  # bytes; of the first slab where no plan says; each further one holds as much as is held


@dataclass(eq=False)
class Ticket:
    """A tensor that lies in host memory."""

    place: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    ready: Any = None
    fetched: Tensor | None = None
    arrived: Any = None
    released: bool = False
    owners: int = 0
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
        self._free: list[Tensor] = []  # returned places
        self._open: Tensor | None = None  # the rest of the newest slab
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
            self._slabs, self._free, self._open = [], [], None
            self._grow(size)

    def put(self, tensor: Tensor) -> Ticket:
        """Start copying `tensor` out; the caller may drop it at once."""
        tensor = tensor.detach()
        if not tensor.is_contiguous() and not _is_dense(tensor):
            tensor = tensor.contiguous()
        size = tensor.numel() * tensor.element_size()
        flat = torch.as_strided(tensor, (tensor.numel(),), (1,), tensor.storage_offset())
        ticket = Ticket(self._place(tensor.dtype, size), tensor.shape, tensor.stride())
        if self._out is None:
            with host_allocation():
                ticket.place.copy_(flat)
        else:
            self._out.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._out):
                ticket.place.copy_(flat, non_blocking=True)
                ticket.ready = self._out.record_event()
            flat.record_stream(self._out)
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
        """Give the ticket's host memory to the next tensor of its size."""
        if ticket.released:
            return
        ticket.released, ticket.fetched = True, None
        if ticket.ready is not None and not ticket.ready.query():
            ticket.ready.synchronize()
        if ticket.arrived is not None and not ticket.arrived.query():
            ticket.arrived.synchronize()
        self.held_bytes -= ticket.place.numel() * ticket.place.element_size()
        self._free.append(ticket.place.view(torch.uint8))
        if self.held_bytes == 0:  # begin anew: the next call's tensors have other sizes
            self._free = self._slabs[:-1]
            self._open = self._slabs[-1] if self._slabs else None

    def _place(self, dtype: torch.dtype, size: int) -> Tensor:
        for index, free in enumerate(self._free):
            if free.numel() == size:
                return self._free.pop(index).view(dtype)
        rounded = -(-max(size, 1) // _ALIGN) * _ALIGN
        if self._open is None or self._open.numel() < rounded:
            larger = [
                index for index, free in enumerate(self._free) if free.numel() >= rounded and free.numel() > _SLAB
            ]
            if larger:  # a whole slab of an earlier call
                self._open = self._free.pop(larger[0])
            else:
                self._grow(max(rounded, _SLAB, self.held_bytes))
        assert self._open is not None
        place, self._open = self._open[:size], self._open[rounded:]
        return place.view(dtype)

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
        self._open = slab


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
