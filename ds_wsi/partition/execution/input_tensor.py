"""The input of a call, the caller's tensor: read a chunk at a time, or its cost pretended."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_wsi.partition.execution.host_store import HostStore
from ds_wsi.partition.execution.ticket import Arriving
from ds_wsi.runtime.contracts import PreparesAt
from ds_wsi.runtime.memory import ByteMeter

Range = tuple[int, int]  # [first, last)
Prepare = Callable[[Tensor], Tensor]


def prepared(prepare: Prepare, part: Tensor, first: int) -> Tensor:
    """A chunk that begins at tile `first`, prepared; a `prepare` with a method `at` is told where."""
    return prepare.at(part, first) if isinstance(prepare, PreparesAt) else prepare(part)


class InputTensor:
    """The input of a call: the caller's tensor, read a chunk at a time.

    Args:
        tensor: the caller's tensor, on the device or on the host; page-locked host memory is copied ahead of its use.
        dim: the dimension that chunks divide.
        device: the device that computes.
        prepare: applied to each chunk on the device: see `prepared`.
        store: the store whose stream copies ahead; None copies when a chunk is read.
    """

    def __init__(
        self,
        tensor: Tensor,
        dim: int,
        device: torch.device,
        prepare: Prepare | None,
        store: HostStore | None = None,
    ) -> None:
        self._arriving: dict[Range, Arriving] = {}
        self.tensor, self.dim, self.device, self.prepare = tensor, dim, device, prepare
        self.check: Callable[[], None] | None = None  # called before the tensor is read
        ahead = store is not None and store.copies_ahead and tensor.device.type == "cpu" and tensor.is_pinned()
        self._store = store if ahead else None

    def __del__(self) -> None:
        """A call that ends in an error, or is dropped, has chunks on their way."""
        self._drop_arriving()

    def read(self, where: Range) -> Tensor:
        """The chunk on the device, prepared."""
        if self.check is not None:
            self.check()
        arriving = self._arriving.pop(where, None)
        part = self._part(where).to(self.device, non_blocking=True) if arriving is None else arriving.get()
        return part if self.prepare is None else prepared(self.prepare, part, where[0])

    def prefetch(self, where: Range) -> None:
        """Start copying a chunk to the device, where that goes on beside the computing."""
        if self._store is not None and where not in self._arriving:
            self._arriving[where] = self._store.bring(self._part(where))

    @property
    def is_empty(self) -> bool:
        """Whether nothing was written: the caller's tensor is there."""
        return False

    def drop(self, where: Range) -> None:
        """Keep: the caller's tensor is his."""

    def clear(self) -> None:
        """Drop what was copied ahead; the caller's tensor is his."""
        self._drop_arriving()

    def _drop_arriving(self) -> None:
        while self._arriving:
            self._arriving.popitem()[1].drop()

    def _part(self, where: Range) -> Tensor:
        return self.tensor.narrow(self.dim, where[0], where[1] - where[0])


@dataclass(frozen=True)
class InputCost:
    """What a tile, or a row of the images, of the input takes on the device before the encoder sees it.

    Args:
        copied: bytes of its copy from host memory; 0 where the input lies on the device.
        prepared: another tensor than the copy reaches the encoder.
        working: bytes while it is prepared, beyond the copy and the result.
        ahead: the next chunk is copied while one is computed.
    """

    copied: int = 0
    prepared: bool = False
    working: int = 0
    ahead: bool = False


class PretendedInput(InputTensor):
    """An input of a simulated call: its chunks take the memory that real ones would."""

    def __init__(self, tensor: Tensor, dim: int, cost: InputCost) -> None:
        super().__init__(tensor, dim, tensor.device, None)
        self.cost = cost
        self._copies: dict[Range, Tensor] = {}

    def read(self, where: Range) -> Tensor:
        """A chunk."""
        copied = self._copies.pop(where, None)
        if copied is None:
            copied = self._copy(where)
        if not self.cost.prepared:
            return copied
        working = self._bytes(self.cost.working, where)
        result = torch.empty_like(self._part(where), memory_format=torch.contiguous_format)
        del copied, working
        return result

    def prefetch(self, where: Range) -> None:
        """Take the memory of a chunk's copy."""
        if self.cost.ahead and where not in self._copies:
            self._copies[where] = self._copy(where)

    def clear(self) -> None:
        """Give it back."""
        self._copies.clear()

    def _copy(self, where: Range) -> Tensor:
        if self.cost.prepared:
            return self._bytes(self.cost.copied, where)
        part = self._part(where)
        return torch.empty_like(part, memory_format=torch.contiguous_format) if self.cost.copied else part

    def _bytes(self, each: int, where: Range) -> Tensor:
        return torch.empty(each * (where[1] - where[0]), dtype=torch.uint8, device=self.device)


def input_cost(x: Tensor, dim: int, device: torch.device, prepare: Prepare | None) -> InputCost:
    """What a tile of `x`, or a row, takes before the encoder sees it, by one that is prepared for the trial."""
    if x.shape[dim] == 0:
        return InputCost()
    unit = x.narrow(dim, 0, 1)
    copied = 0 if x.device == device else unit.numel() * unit.element_size()
    ahead = copied > 0 and device.type == "cuda" and x.is_pinned()
    if prepare is None:
        return InputCost(copied, ahead=ahead)
    with torch.no_grad(), ByteMeter() as meter:
        result = prepare(unit.to(device))
    is_new = result.untyped_storage()._cdata != unit.untyped_storage()._cdata
    result_bytes = result.untyped_storage().nbytes() if is_new else 0
    return InputCost(copied, is_new, max(0, meter.peak - result_bytes - copied), ahead)
