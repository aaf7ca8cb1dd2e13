"""Host memory as an extension of the device's: tensors copied out and back on streams of their own.

Slabs of page-locked memory hold them. Copies out wait for the computation that made the tensor; copies back are started
ahead of their use. A tensor on its way out holds its device memory until its copy has ended, and only so many bytes may
be on their way: beyond that the computing stream waits for the oldest copy. The CPU itself never waits, but for a disk.
Without a GPU the same code runs with plain memory and no streams, so that what is copied, and how many bytes, is the
same everywhere; a simulated call holds what a real one may hold at worst.

Beyond a limit of host memory the tensors that were kept first, which backward needs last, go to a disk.
"""

import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_wsi.partition.execution.dense import dense_pairs, is_dense
from ds_wsi.partition.execution.free_list import Block, FreeList, blocks_overlap
from ds_wsi.partition.execution.ticket import Arriving, Ticket
from ds_wsi.partition.execution.turns import Turns, in_turn
from ds_wsi.runtime.memory import host_allocation
from ds_wsi.runtime.pinned import PageLocked, locked_or_none

_ALIGN = 256  # bytes; of every tensor in a slab
ALIGN = 4096  # the same where a disk is read and written past the page cache
_SLAB = 2**22  # bytes; at least, of a slab that no plan reserved
_GROWTH = 16  # such a slab is one part in so many of what is held: page-locked memory is dear
IN_FLIGHT = 2  # of the largest tensor's bytes, on their way out at most
_SHARED = 2  # tensors kept on the device at most, for the other nodes that saved them


class Spill(Protocol):
    """A disk for what host memory does not hold. Its methods are called from one thread, the store's own."""

    def write(self, data: Tensor) -> Any:
        """Write bytes (uint8, a multiple of `ALIGN`) and return their place, once they are there."""

    def read(self, place: Any, data: Tensor) -> None:
        """Fill `data` with the bytes of a place."""

    def free(self, place: Any) -> None:
        """Forget a place."""


class HostStore:
    """Tensors in host memory; the memory is kept from call to call, because locking pages takes long.

    Args:
        device: the device that the tensors come from and go back to.
        overlap: copies run beside the computing; by default on a GPU.
        simulated: the call is one on fake tensors: no streams, and with `overlap` each copy takes as long as one can.
        spill: a disk for what goes beyond `limit_bytes` of host memory.
        limit_bytes: bytes of host memory at most, with a spill.

    Attributes:
        held_bytes, peak_bytes: bytes kept, in host memory and on the disk, now and at most.
        sent_bytes, fetched_bytes: bytes over the link so far.
        spilled_bytes: bytes written to the disk so far.
        turns: the turns that the store's operations take.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        overlap: bool | None = None,
        simulated: bool = False,
        spill: Spill | None = None,
        limit_bytes: int = 2**62,
    ) -> None:
        self.device, self.limit_bytes = device, limit_bytes
        self.held_bytes = self.peak_bytes = self.sent_bytes = self.fetched_bytes = self.spilled_bytes = 0
        self._overlap = device.type == "cuda" if overlap is None else overlap
        streams = device.type == "cuda" and self._overlap and not simulated
        self._out: Any = torch.cuda.Stream(device) if streams else None
        self._back: Any = torch.cuda.Stream(device) if streams else None
        self._host = device if device.type == "meta" else torch.device("cpu")
        self._slabs: list[Tensor] = []
        self._locked: list[PageLocked] = []
        self._lock_pages = streams
        self._free = FreeList()
        self._busy: list[tuple[Block, Any]] = []  # free blocks that a copy back still reads, and its event
        self._known: dict[Any, tuple[Ticket, weakref.ref]] = {}
        self._leaving: deque[tuple[Ticket, Tensor]] = deque()  # the oldest first
        self._leaving_bytes = self._largest = self._sent = 0
        self._shared: deque[Ticket] = deque()  # fetched, and wanted by one more owner
        self._spill, self._align = spill, _ALIGN if spill is None else ALIGN
        self.turns = Turns()
        self._thread = ThreadPoolExecutor(1, "ds_wsi-spill", self.turns.bar) if spill is not None else None
        self._inside: deque[Ticket] = deque()  # in host memory, the oldest first; with a spill only
        self._ahead_bytes = 0  # to be written to the disk before there is need, because a plan foresees it

    @property
    def capacity_bytes(self) -> int:
        """Host memory that the store has taken."""
        return sum(slab.numel() for slab in self._slabs)

    @in_turn
    def reserve(self, size: int) -> None:
        """Take `size` bytes in one slab, unless they are there or in use; beyond the limit the disk serves."""
        if self.held_bytes:
            return
        self._ahead_bytes = max(0, size - self.limit_bytes) if self._spill is not None else 0
        size = size - self._ahead_bytes
        if self.capacity_bytes < size:
            self._slabs, self._free, self._busy = [], FreeList(), []
            while self._locked:
                self._locked.pop().close()  # or the old memory would be held beside the new
            self._grow(size)

    @in_turn
    def put(self, tensor: Tensor) -> Ticket:
        """Start copying `tensor` out; the caller may drop it at once.

        A tensor that lies there already, unchanged since, is not copied again: the ticket has one more owner.
        """
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        seen = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()
        key = storage._cdata, tensor._version, *seen
        entry = self._known.get(key)
        # An address is used again once its storage is freed: then the entry is another tensor's.
        if entry is not None and entry[1]() is storage and not entry[0].released:
            entry[0].owners += 1
            return entry[0]
        tensor = tensor.resolve_conj().resolve_neg()  # bytes say nothing of what a view only promises
        if not tensor.is_contiguous() and not is_dense(tensor):
            tensor = tensor.contiguous()
        size = tensor.numel() * tensor.element_size()
        flat = torch.as_strided(tensor, (tensor.numel(),), (1,), tensor.storage_offset())
        ticket = Ticket(None, tensor.dtype, size, tensor.shape, tensor.stride(), None)
        memory, busy = self._place(ticket)
        if self._out is None:
            with host_allocation():
                memory.copy_(flat)
        else:
            ticket.stream = torch.cuda.current_stream(self.device)
            self._out.wait_stream(torch.cuda.current_stream(self.device))
            for event in busy:
                self._out.wait_event(event)
            with torch.cuda.stream(self._out):
                memory.copy_(flat, non_blocking=True)
                ticket.ready = self._out.record_event()
        if self._overlap:
            self._hold_until_sent(ticket, flat)
        self._known[key] = ticket, weakref.ref(storage)
        ticket.key = key
        self.sent_bytes += size
        self.held_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        if self._spill is not None:
            self._inside.append(ticket)
            if self._ahead_bytes > 0:
                self._ahead_bytes -= size
                self._write(ticket)
        return ticket

    @in_turn
    def prefetch(self, ticket: Ticket) -> None:
        """Start bringing the tensor back: from the disk to host memory, or from there to the device."""
        if ticket.fetched is not None or ticket.released or ticket.reading is not None:
            return
        if ticket.memory is None:
            _, busy = self._place(ticket)
            assert self._thread is not None
            assert ticket.written is not None
            ticket.reading = self._thread.submit(self._read, ticket.written, self._block(ticket), busy)
            self._inside.appendleft(ticket)  # still on the disk too: it costs nothing to drop it again
            return
        memory = ticket.memory
        # Memory of the computing stream's pool: waits until the allocator's earlier users there are done.
        flat = torch.empty(memory.shape, dtype=memory.dtype, device=self.device)
        if self._back is None:
            with host_allocation():
                flat.copy_(memory)
        else:
            ticket.stream = torch.cuda.current_stream(self.device)
            self._back.wait_stream(torch.cuda.current_stream(self.device))
            if ticket.ready is not None:
                self._back.wait_event(ticket.ready)
            with torch.cuda.stream(self._back):
                flat.copy_(memory, non_blocking=True)
                ticket.arrived = self._back.record_event()
        ticket.fetched = torch.as_strided(flat, ticket.shape, ticket.stride)
        self.fetched_bytes += ticket.size

    @in_turn
    def get(self, ticket: Ticket) -> Tensor:
        """The tensor on the device, which the caller must not change; the store keeps its copy until `release`.

        Where other owners will ask for it too, the last few tensors stay on the device for them.
        """
        self.prefetch(ticket)
        if ticket.reading is not None:
            ticket.reading.result()
            ticket.reading = ticket.ready = None
            self.prefetch(ticket)
        if ticket.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(ticket.arrived)
        # What comes back was sent, and what was sent before it: copies out are in order.
        while self._leaving and self._leaving[0][0].number <= ticket.number:
            self._let_go()
        tensor = ticket.fetched
        assert tensor is not None
        if ticket.owners == 1:
            ticket.fetched = None
        elif ticket not in self._shared:
            self._shared.append(ticket)
            if len(self._shared) > _SHARED:
                self._shared.popleft().fetched = None
        return tensor

    @in_turn
    def release(self, ticket: Ticket) -> None:
        """Give up an owner's claim; with the last one the memory goes to the next tensors."""
        self.give_up(ticket)

    def drop(self, ticket: Ticket) -> None:
        """The same from a `__del__`, on whatever thread: see [Note: dropped tickets]."""
        self.turns.drop(ticket, self.give_up)

    def give_up(self, ticket: Ticket) -> None:
        """What `release` does, within a turn."""
        ticket.owners -= 1
        if ticket.owners > 0 or ticket.released:
            return
        self._known.pop(ticket.key, None)
        if ticket in self._shared:
            self._shared.remove(ticket)
        if ticket.fetched is not None and ticket.arrived is not None:
            # Nobody has waited for the copy that still writes there.
            ticket.stream.wait_event(ticket.arrived)
        ticket.released, ticket.fetched = True, None
        self.held_bytes -= ticket.size
        if not self.held_bytes:
            self._let_all_go()
        if ticket.memory is not None:
            self._vacate(ticket)
        if ticket.written is not None and self._thread is not None:
            with suppress(RuntimeError):  # the interpreter is ending, and the file with it
                self._thread.submit(self._forget, ticket.written)

    def bring(self, part: Tensor) -> Arriving:
        """Start copying page-locked host memory to the device: a chunk of an input, ahead of its use."""
        target = torch.empty(part.shape, dtype=part.dtype, device=self.device)
        if is_dense(part):  # tiles with the channels last in memory are
            target = target.as_strided(part.shape, part.stride())
        stream = torch.cuda.current_stream(self.device)
        self._back.wait_stream(stream)
        with torch.cuda.stream(self._back):
            # Rows of an image are dense channel by channel only, and what is not dense is staged by the CPU.
            for one, other in dense_pairs(part, target):
                other.copy_(one, non_blocking=True)
            return Arriving(target, self._back.record_event(), stream)

    @property
    def copies_ahead(self) -> bool:
        """Whether `bring` runs beside the computing."""
        return self._back is not None

    # ---------------------------------------------------------------------------------------- memory of the device

    def _hold_until_sent(self, ticket: Ticket, tensor: Tensor) -> None:
        """Keep a tensor until its copy has ended; the computing waits for the oldest where too many are kept."""
        self._sent += 1
        ticket.number = self._sent
        self._leaving.append((ticket, tensor))
        self._leaving_bytes += ticket.size
        self._largest = max(self._largest, ticket.size)
        while self._leaving_bytes > IN_FLIGHT * self._largest:
            ready = self._leaving[0][0].ready
            if ready is not None:
                torch.cuda.current_stream(self.device).wait_event(ready)
            self._let_go()
        while self._leaving and (ready := self._leaving[0][0].ready) is not None and ready.query():
            self._let_go()

    def _let_go(self) -> None:
        self._leaving_bytes -= self._leaving.popleft()[0].size

    def _let_all_go(self) -> None:
        """Hold nothing on the device, and forget how large tensors were: as a plan takes the store to be.

        Nobody will read these copies any more; still no memory is given away under one.
        """
        while self._leaving:
            ticket = self._leaving[0][0]
            if ticket.ready is not None:
                ticket.stream.wait_event(ticket.ready)
            self._let_go()
        self._largest = 0

    # ------------------------------------------------------------------------------------------------ host memory

    def _place(self, ticket: Ticket) -> tuple[Tensor, list[Any]]:
        """Memory for a ticket, and the events of copies that read it still."""
        rounded = -(-max(ticket.size, 1) // self._align) * self._align
        block = self._free.take(rounded)
        while block is None and self.capacity_bytes + rounded > self.limit_bytes and self._evict():
            block = self._free.take(rounded)
        if block is None:
            slab_size = max(_SLAB, self.held_bytes // _GROWTH)
            if self._spill is not None:
                slab_size = min(slab_size, self.limit_bytes - self.capacity_bytes)
            self._grow(max(rounded, slab_size))
            block = self._free.take(rounded)
        assert block is not None
        slab, offset, _ = ticket.block = block
        ticket.memory = self._slabs[slab][offset : offset + ticket.size].view(ticket.dtype)
        self._busy = [(other, event) for other, event in self._busy if not event.query()]
        return ticket.memory, [event for other, event in self._busy if blocks_overlap(block, other)]

    def _block(self, ticket: Ticket) -> Tensor:
        """All bytes of a ticket's memory."""
        assert ticket.block is not None
        slab, offset, length = ticket.block
        return self._slabs[slab][offset : offset + length]

    def _vacate(self, ticket: Ticket) -> None:
        """Free a ticket's memory; whoever writes there next waits for the copies that use it."""
        wait([future for future in (ticket.written, ticket.reading) if future is not None])
        assert ticket.block is not None
        for event in (ticket.ready, ticket.arrived):
            if event is not None and not event.query():
                self._busy.append((ticket.block, event))
        self._free.give_back(ticket.block)
        ticket.block = ticket.memory = ticket.reading = None

    # ------------------------------------------------------------------------------------------------ disk

    def _evict(self) -> bool:
        """Move the oldest tensor to the disk; False where there is none."""
        while self._inside:
            ticket = self._inside.popleft()
            if not ticket.released and ticket.memory is not None:
                self._write(ticket)
                assert ticket.written is not None
                ticket.written.result()  # raises what the disk had against it
                self._vacate(ticket)
                return True
        return False

    def _write(self, ticket: Ticket) -> None:
        if ticket.written is None and self._thread is not None:
            ticket.written = self._thread.submit(self._write_now, ticket.ready, self._block(ticket))
            self.spilled_bytes += ticket.size

    def _write_now(self, ready: Any, data: Tensor) -> Any:
        if ready is not None:
            ready.synchronize()
        assert self._spill is not None
        return self._spill.write(data)

    def _read(self, written: Future, data: Tensor, busy: list[Any]) -> None:
        assert self._spill is not None
        for event in busy:
            event.synchronize()
        self._spill.read(written.result(), data)

    def _forget(self, written: Future) -> None:
        assert self._spill is not None
        if written.exception() is None:
            self._spill.free(written.result())

    def _grow(self, size: int) -> None:
        rounded = -(-size // self._align) * self._align
        self._slabs.append(self._slab(rounded))
        self._free.give_back((len(self._slabs) - 1, 0, rounded))

    def _slab(self, size: int) -> Tensor:
        if self._lock_pages:
            locked = locked_or_none(size, self.device)
            if locked is not None:
                self._locked.append(locked)
                return locked.data
            self._lock_pages = False
        with host_allocation():
            return torch.empty(size, dtype=torch.uint8, device=self._host)
