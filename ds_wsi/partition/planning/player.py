"""Recorded passes, played in a simulated call: the meter is told of bytes, and tensors are made, saved and dropped."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ds_wsi.partition.graph.subgraph import Subgraph
from ds_wsi.partition.planning.tape import Act, Form, Given, Part, Place, Tape, form_of
from ds_wsi.runtime.memory import ByteMeter
from ds_wsi.runtime.seams import storage_key

Work = Callable[[list[Tensor]], tuple[list[Tensor | None], Any]]
_META = torch.device("meta")


class Player:
    """The recorded passes of one module, played in any of its simulated calls.

    Args:
        new_tape: makes a tape.
        parameters: the storages of the module's parameters.
    """

    def __init__(self, new_tape: Callable[[], Tape], parameters: set[int]) -> None:
        self.new_tape, self.parameters = new_tape, parameters
        self.parts: dict[Hashable, Part] = {}
        self._kinds: dict[Hashable, int] = {}
        self._kind_of: dict[Subgraph, int] = {}
        self.live: dict[Hashable, Any] = {}  # recorded forwards whose backward is not recorded yet
        self.meter: ByteMeter | None = None  # of the call that is simulated

    def kind(self, graph: Subgraph) -> int:
        """A number that parts of a module's graph share which compute the same."""
        if graph not in self._kind_of:
            nodes = tuple(graph.sources), tuple(graph.targets), frozenset(graph.sites)
            key = id(graph.traced), *nodes, graph.rules is None
            self._kind_of[graph] = self._kinds.setdefault(key, len(self._kinds))
        return self._kind_of[graph]

    def given(self, tensor: Tensor) -> Given:
        """What a tape needs to know of a tensor."""
        return Given(form_of(tensor), storage_key(tensor) not in self.parameters)

    def play(
        self, part: Part, slots: dict[int, Any], hooks: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None
    ) -> list[Tensor | None]:
        """Do what was recorded; `slots` has what was given by its number, and has what the graph holds afterwards.

        Args:
            part: the recording.
            slots: number -> tensor.
            hooks: what saves a tensor on the host, and what brings it back.
        """
        meter = self.meter
        assert meter is not None
        meter.operations += part.operations
        meter.flops += part.flops
        meter.touched += part.touched
        for peak, more, event in part.steps:
            meter.peak = max(meter.peak, meter.live + peak)
            meter.live += more
            if event is None:
                break
            act, number = event.act, event.number
            if act is Act.MAKE:
                assert event.form is not None
                slots[number] = _storage_of(event.form, event.size, event.offset)
                meter.book(slots[number])
            elif act is Act.DROP or act is Act.FORGET:
                slots.pop(number, None)
            elif act is Act.SAVE:
                assert hooks is not None
                assert event.form is not None
                slots[number] = hooks[0](_part_of(slots[event.other], event.form, event.offset))
            else:
                assert hooks is not None
                slots[number] = hooks[1](slots[event.other])
        outputs = [None if output is None else self._output(output, slots, part.foreign) for output in part.outputs]
        for number in [number for number in slots if number not in part.held]:
            del slots[number]
        return outputs

    def pure(self, key: Hashable, tensors: list[Tensor], work: Work) -> tuple[list[Any], Any]:
        """What `work` makes of these tensors, which the caller holds, and what it says beside."""
        key = key, tuple(map(form_of, tensors))
        part = self.parts.get(key)
        if part is None:
            part = self.parts[key] = self.new_tape().part([self.given(tensor) for tensor in tensors], work)
        return self.play(part, dict(zip(part.given, tensors, strict=True)), None), part.aside

    def _output(self, output: Place, slots: dict[int, Any], foreign: dict[int, Form]) -> Tensor:
        if output.number in foreign and output.number not in slots:
            slots[output.number] = _storage_of(output.form, 0, output.offset)
        return _part_of(slots[output.number], output.form, output.offset)


def _storage_of(form: Form, size: int, offset: int) -> Tensor:
    """A tensor of this form, in a storage that holds at least `size` bytes."""
    with torch._C._DisableTorchDispatch():
        tensor = torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=_META)
        if not offset and tensor.untyped_storage().nbytes() >= size:
            return tensor
        flat = torch.empty(-(-size // form.dtype.itemsize) + offset, dtype=form.dtype, device=_META)
        return flat.as_strided(form.shape, form.stride, offset)


def _part_of(base: Tensor, form: Form, offset: int) -> Tensor:
    """A tensor of this form in the storage of another."""
    if not offset and form_of(base) == form:
        return base
    offset += int(base.storage_offset())
    with torch.no_grad(), torch._C._DisableTorchDispatch():
        if base.dtype == form.dtype:
            return base.as_strided(form.shape, form.stride, offset)
        return torch.empty(0, dtype=form.dtype, device=_META).set_(
            base.untyped_storage(), offset, form.shape, form.stride
        )
