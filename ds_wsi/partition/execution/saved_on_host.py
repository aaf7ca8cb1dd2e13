"""What autograd saves, and the inputs of norms, in host memory from forward to backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from ds_wsi.partition.execution.chunk_ranges import ChunkRanges
from ds_wsi.partition.execution.chunked_tensor import ChunkedTensor
from ds_wsi.partition.execution.host_store import HostStore
from ds_wsi.partition.execution.ticket import Ticket
from ds_wsi.partition.execution.versions import Guard

_MIN_OFFLOAD_BYTES = 2**12  # smaller tensors cost more to copy than to keep


class SavedOnHost:
    """The saved tensors of one call in host memory, in the order in which they were saved.

    What stays on the device must be unchanged when backward reads it, as autograd demands without hooks.

    Args:
        module: the module whose parameters stay where they are.
        store: the store of host memory.
        source: the call's input, for errors.
    """

    def __init__(self, module: nn.Module, store: HostStore, source: Tensor) -> None:
        self.module, self.store = module, store
        self._source = source.untyped_storage()._cdata
        self._order: dict[Ticket, int] = {}  # of this call: another one may own the same tickets
        self._tickets: list[Ticket] = []

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Autograd's saved tensors in host memory, each once; parameters and small ones stay."""
        places = {p.untyped_storage()._cdata: f"parameter {name!r}" for name, p in self.module.named_parameters()}

        def pack(tensor: Tensor) -> Any:
            storage = tensor.untyped_storage()._cdata
            if storage in places or not goes_to_host(tensor, self.store.device):
                return Kept(tensor, places.get(storage, "the input" if storage == self._source else None))
            return self.pack(tensor)

        with torch.autograd.graph.saved_tensors_hooks(pack, self.unpack):
            yield

    def pack(self, tensor: Tensor) -> "OnHost":
        """A saved tensor's place in host memory."""
        ticket = self.store.put(tensor)
        if ticket not in self._order:
            self._order[ticket] = len(self._tickets)
            self._tickets.append(ticket)
        return OnHost(self.store, ticket)

    def unpack(self, packed: Any) -> Tensor:
        """The tensor that was saved."""
        if isinstance(packed, Kept):
            return packed.read()
        tensor = self.store.get(packed.ticket)
        order = self._order[packed.ticket]
        if order:  # backward reads in about the reverse order
            self.store.prefetch(self._tickets[order - 1])
        return tensor


def goes_to_host(tensor: Tensor, device: torch.device) -> bool:
    """Whether a saved tensor pays to be moved; not one on the host, that a module computes with, say."""
    return tensor.device == device and tensor.numel() * tensor.element_size() >= _MIN_OFFLOAD_BYTES


class Kept(Guard):
    """A saved tensor that stays."""

    def read(self) -> Tensor:
        """The tensor, unchanged."""
        self.armed = True
        self.check()
        return self.tensor


class OnHost:
    """A saved tensor's place; the memory is given back when autograd frees the node that saved it."""

    def __init__(self, store: HostStore, ticket: Ticket) -> None:
        self.store, self.ticket = store, ticket

    def __del__(self) -> None:
        self.store.drop(self.ticket)


def move_to_host(values: dict[fx.Node, ChunkedTensor], ranges: ChunkRanges) -> None:
    """Norm inputs are read once more, for the correction: they follow the saved tensors to the host."""
    for node in list(values):
        value = values[node]
        moved = ranges.make_value(node, host=True)
        for chunk in ranges.chunks:
            where = ranges.own(node, chunk)
            moved.write(where, value.read(where))
        value.clear()
        values[node] = moved
