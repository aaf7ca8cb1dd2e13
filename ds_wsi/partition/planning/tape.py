"""What a pass over one chunk does to memory, written down once and played again wherever the same pass comes.

A tape is recorded on stand-ins for what the pass is given, beside the simulated call. It holds when bytes are taken and
given back, and when a tensor that others hold too is made, saved, read again or dropped: those tensors are made in the
call, so that who holds them longest decides, as in a real one. All other tensors are numbers.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from ds_wsi.partition.execution.saved_on_host import Kept, goes_to_host
from ds_wsi.partition.planning.shapes import ShapeMeter
from ds_wsi.runtime.seams import storage_key


class Form(NamedTuple):
    """A tensor without its numbers."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def form_of(tensor: Tensor) -> Form:
    """A tensor's form."""
    return Form(tensor.shape, tensor.stride(), tensor.dtype)


class Given(NamedTuple):
    """A tensor that a pass is given; one that is not `numbered` is a parameter's memory."""

    form: Form
    numbered: bool = True


class Act(Enum):
    """What happens to a tensor that is more than a number of bytes."""

    MAKE = "it is made"
    DROP = "the pass, or its graph, holds it no longer"
    SAVE = "autograd saves it on the host"
    READ = "autograd reads what it has saved"
    FORGET = "autograd needs what it has saved no longer"


class Event(NamedTuple):
    """Something that happens to the storage, or the saved tensor, of this number."""

    act: Act
    number: int
    size: int = 0
    form: Form | None = None
    offset: int = 0
    other: int = 0


class Place(NamedTuple):
    """A tensor as a part of the storage with this number; `offset`: beyond that of the storage's first tensor."""

    number: int
    form: Form
    offset: int


class Step(NamedTuple):
    """Bytes at most, and more, since the step before; then an event, or the end."""

    peak: int
    more: int
    event: Event | None


@dataclass(frozen=True)
class Part:
    """A recorded forward or backward.

    Attributes:
        steps: what happens, in order.
        outputs: what it returns; None for a gradient that does not flow.
        given: the numbers of what it was given.
        held: the numbers of tensors that the graph holds at the end.
        foreign: the numbers of outputs that it has not made.
        operations, flops, touched: the same as in `ByteMeter`.
        aside: what the recording wants known, beside tensors.
        bytes: what its graph holds beyond tensors, more than before.
    """

    steps: list[Step]
    outputs: list[Place | None]
    given: list[int]
    held: frozenset[int]
    foreign: dict[int, Form]
    operations: int
    flops: int
    touched: int
    aside: Any
    bytes: int


class _Saved:
    """Stands for what autograd has saved on the host."""

    def __init__(self, tape: "Tape", number: int, form: Form, device: torch.device) -> None:
        self.tape, self.number, self.form, self.device = tape, number, form, device

    def __del__(self) -> None:
        self.tape.log.append(Event(Act.FORGET, self.number))


class Tape(ShapeMeter):
    """Records one pass, forward and then perhaps backward.

    Args:
        known: see `ShapeMeter`.
        mode: the mode of fake tensors; None for meta tensors.
        device: the device that is pretended.
        parameters: the storages of the module's parameters.
    """

    def __init__(
        self, known: dict[Any, Any], mode: FakeTensorMode | None, device: torch.device, parameters: set[int]
    ) -> None:
        super().__init__(known, mode)
        self.device, self.parameters = device, parameters
        self.log: list[Event] = []
        self._numbers = count()
        self._number_of: dict[int, int] = {}
        self._offset_of: dict[int, int] = {}  # of a storage's first tensor, where that is not 0
        self._wanted: set[int] = set()  # what is more than bytes
        self._saved: set[int] = set()
        self._ends: dict[int, weakref.ref] = {}
        self._sizes: dict[int, int] = {}  # of the others that are alive

    def part(self, given: list["Given"], work: Callable[[list[Tensor]], tuple[list[Tensor | None], Any]]) -> Part:
        """Record `work`, which is given stand-ins in a list that it may empty.

        It returns tensors, and what else is to be known. What its graph holds must be held elsewhere.
        """
        self.operations = self.flops = self.touched = 0
        self.log.clear()
        with _disable_current_modes(), self.mode or nullcontext():
            tensors = [self._stand_in(form, numbered=numbered) for form, numbered in given]
            numbers = [self._number_of.get(storage_key(tensor), -1) for tensor in tensors]
            with self:
                outputs, aside = work(tensors)
            places, foreign = self._places(outputs)
            end = len(self.log)
            tensors.clear()
            outputs.clear()
        self._wanted |= {output.number for output in places if output is not None} | set(numbers)
        for event in self.log:
            if event.act is Act.SAVE:
                self._wanted |= {event.number, event.other}
                self._saved.add(event.number)
            elif event.act is Act.READ:
                self._wanted.add(event.number)
            elif event.act is Act.FORGET:
                self._saved.discard(event.number)
        late = [event for event in self.log[end:] if event.number not in self._wanted or event.act is Act.FORGET]
        steps = self._steps([*self.log[:end], *late])
        more = sum(step.more for step in steps)
        held = frozenset(self._wanted & set(self._number_of.values()) | self._saved)
        return Part(steps, places, numbers, held, foreign, self.operations, self.flops, self.touched, aside, more)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Autograd's saved tensors, as `SavedOnHost` moves them."""

        def pack(tensor: Tensor) -> Any:
            number = self._number_of.get(storage_key(tensor))
            if number is None or storage_key(tensor) in self.parameters or not goes_to_host(tensor, self.device):
                return Kept(tensor, None)
            saved = _Saved(self, next(self._numbers), form_of(tensor), tensor.device)
            offset = int(tensor.storage_offset()) - self._offset_of.get(number, 0)
            self.log.append(Event(Act.SAVE, saved.number, 0, saved.form, offset, number))
            return saved

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Kept):
                return packed.read()
            with _disable_current_modes(), self.mode or nullcontext():
                tensor = self._stand_in(packed.form, numbered=True)
            number = self._number_of[storage_key(tensor)]
            self.log.append(Event(Act.READ, number, other=packed.number))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _stand_in(self, form: Form, *, numbered: bool) -> Tensor:
        tensor = torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=self.device)
        if numbered:
            self._number(tensor)
        return tensor

    def _places(self, outputs: list[Tensor | None]) -> tuple[list[Place | None], dict[int, Form]]:
        foreign: dict[int, Form] = {}
        places: list[Place | None] = []
        for tensor in outputs:
            if tensor is None:
                places.append(None)
                continue
            number = self._number_of.get(storage_key(tensor))
            if number is None:
                number = next(self._numbers)
                foreign[number] = form_of(tensor)
            places.append(Place(number, form_of(tensor), int(tensor.storage_offset()) - self._offset_of.get(number, 0)))
        return places, foreign

    def _number(self, tensor: Tensor) -> int:
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        number = self._number_of[key] = next(self._numbers)
        if tensor.storage_offset():
            self._offset_of[number] = int(tensor.storage_offset())
        self._ends[number] = weakref.ref(storage, lambda _: self._forget(key))
        return number

    def book(self, tensor: Tensor) -> None:
        """Number a new tensor."""
        if storage_key(tensor) not in self._number_of:
            number = self._number(tensor)
            size = tensor.untyped_storage().nbytes()
            self.log.append(Event(Act.MAKE, number, size, form_of(tensor), int(tensor.storage_offset())))

    def _forget(self, key: int) -> None:
        number = self._number_of.pop(key)
        del self._ends[number]
        self.log.append(Event(Act.DROP, number))

    def _steps(self, events: list[Event]) -> list[Step]:
        """The events of what is more than bytes, with what the others' bytes come to between them."""
        steps, live, peak = [], 0, 0
        for event in events:
            if event.number in self._wanted:
                steps.append(Step(peak, live, event))
                live = peak = 0
            elif event.act is Act.MAKE:
                self._sizes[event.number] = event.size
                live += event.size
                peak = max(peak, live)
            else:
                live -= self._sizes.pop(event.number, 0)
        steps.append(Step(peak, live, None))
        return steps
