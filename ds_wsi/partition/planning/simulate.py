"""A plan tried out on fake tensors: the same passes over the same chunks, nothing computed, every byte counted."""

import copy
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_wsi.partition.execution.call import PartitionedCall, bag_ranges
from ds_wsi.partition.execution.host_store import HostStore
from ds_wsi.partition.execution.input_tensor import InputCost, PretendedInput
from ds_wsi.partition.graph.leaves import needs_batch_statistics
from ds_wsi.partition.graph.record import Example
from ds_wsi.partition.graph.segments import Program, SegmentSpec
from ds_wsi.partition.graph.trace import Traced
from ds_wsi.partition.module.arguments import Arguments
from ds_wsi.partition.module.hooks import is_compiled, weight_hooks
from ds_wsi.partition.module.outputs import tensors_of
from ds_wsi.partition.planning.player import Player
from ds_wsi.partition.planning.replayed import ReplayedCall
from ds_wsi.partition.planning.shapes import ShapeMeter
from ds_wsi.partition.planning.tape import Tape
from ds_wsi.runtime.memory import ByteMeter
from ds_wsi.runtime.seams import storage_key


@dataclass(frozen=True)
class Phase:
    """The forward or the backward of a segment.

    Attributes:
        peak: bytes on the device at most, of what the call allocates.
        live: bytes on the device at the end.
        host, host_peak: bytes in host memory at the end, and at most.
        copied: bytes over the link.
        flops, touched, operations: floating-point operations, bytes read and written on the device, operations.
        boundary: the neighbour's part of `live`: the output (forward) or the input's gradient (backward).
    """

    name: str
    segment: int
    peak: int
    live: int
    host: int
    host_peak: int
    copied: int
    flops: int
    touched: int
    operations: int
    boundary: int = 0


class Simulator:
    """Simulated calls of one module.

    Args:
        module: the module, on any device; it is not changed.
        axis: "batch" or "spatial".
        device: the device to pretend; kernels that save different tensors on different devices are told apart.
        dtype: the input's dtype.
        autocast: the dtype of mixed precision, or None.
        overlaps: copies to and from host memory run beside the computing, and hold memory while they do.
        source: what the input takes before the encoder sees it.
        arguments: the call's arguments beside the tiles.
        played: passes are recorded once and played again; False runs every one of them, and is slow.
    """

    def __init__(
        self,
        module: nn.Module,
        axis: str,
        device: torch.device,
        dtype: torch.dtype,
        autocast: torch.dtype | None,
        *,
        overlaps: bool = False,
        source: InputCost | None = None,
        arguments: Arguments | None = None,
        played: bool = True,
    ) -> None:
        self.overlaps, self.source, self.played = overlaps, source or InputCost(), played
        self.axis, self.device, self.dtype, self.autocast = axis, device, dtype, autocast
        self.mode: Any = FakeTensorMode(allow_non_fake_inputs=True)
        if autocast is None and any(map(needs_batch_statistics, module.modules())):
            # Meta tensors are several times as fast; they know neither autocast nor the device's attention kernels.
            self.mode, self.device = nullcontext(), torch.device("meta")
        self.module = _fake_copy(module, self.mode, self.device)
        with self.mode:
            arguments = arguments or Arguments()
            self.arguments = arguments.replaced(
                {position: torch.empty_like(value, device=self.device) for position, value in arguments.tensors.items()}
            )
        self._traces: dict[Any, Traced] = {}
        self._programs: dict[Any, Program] = {}
        self._cut: dict[Any, Program] = {}  # by where their segments end
        self._shapes: dict[Any, Any] = {}
        self._player = Player(self._new_tape, {storage_key(parameter) for parameter in self.module.parameters()})

    def traced(self, shape: tuple[int, ...], *, whole: bool) -> Traced:
        """The module's graph for inputs of this shape."""
        key = whole, self._place(shape)
        if key not in self._traces:
            example = Example(shape, self.dtype, self.device, self.arguments)
            with self.mode, self._autocast():
                self._traces[key] = Traced(self.module, self.axis, example, whole=whole)
        return self._traces[key]

    def program(self, specs: tuple[SegmentSpec, ...], shape: tuple[int, ...]) -> Program:
        """The graph cut into these segments."""
        key = specs, self._place(shape)
        if key not in self._programs:
            traced = self.traced(shape, whole=len(specs) == 1)
            ends = tuple(spec.last for spec in specs), self._place(shape)
            if ends not in self._cut:
                with self.mode:
                    self._cut[ends] = Program(traced, specs, self.axis, shape)
            self._programs[key] = self._cut[ends].with_specs(specs)
        return self._programs[key]

    def _place(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if self.axis == "spatial" else shape[1:]

    def run(self, specs: tuple[SegmentSpec, ...], shape: tuple[int, ...]) -> list[Phase]:
        """The phases of a training step of a partitioned module, in order; a backward for every segment.

        That of a segment of frozen parameters, which no gradient goes through, adds nothing.
        """
        program = self.program(specs, shape)
        phases: list[Phase] = []
        device = torch.device("meta") if self.played else self.device
        with nullcontext() if self.played else self.mode, torch.enable_grad():
            x = torch.empty(shape, dtype=self.dtype, device=device)
            # Made before the meter runs, so that the gradient of the output is not counted twice.
            with ShapeMeter(self._shapes) if self.played else ByteMeter() as meter, self._playing(meter):
                call = self._call(program, x)
                call.phase = _Recorder(meter, phases, call)
                with torch.no_grad():
                    output = call.forward()
                    call.backward(torch.empty_like(output))
                for index in reversed(range(2 * len(program.segments) - len(phases))):
                    call.phase("backward", index)
        return phases

    def _call(self, program: Program, x: Tensor) -> PartitionedCall:
        kind = partial(ReplayedCall, self._player) if self.played else PartitionedCall
        return kind(
            program,
            x,
            bag_ranges(None, x.shape[0]),
            prepare=None,
            save=True,
            wants_input_grad=False,
            device=x.device,
            autocast=self._autocast,
            track=False,
            store=HostStore(x.device, overlap=self.overlaps, simulated=True),
            simulated=True,
            arguments=self.arguments,
            pretended=PretendedInput(x, 2 if program.rules is not None else 0, self.source),
        )

    @contextmanager
    def _playing(self, meter: ByteMeter) -> Iterator[None]:
        """Let `meter` count what is played.

        Python's collector of cycles rests: it would look through all that the process holds, again and again.
        """
        collects = gc.isenabled()
        gc.disable()
        self._player.meter = meter
        try:
            yield
        finally:
            self._player.meter = None
            if collects:
                gc.enable()

    def native(self, shape: tuple[int, ...]) -> Phase:
        """The same step of the module as it is."""
        with self.mode, torch.enable_grad():
            x = torch.empty(shape, dtype=self.dtype, device=self.device)
            with ShapeMeter(self._shapes, self._fakes) if self.played else ByteMeter() as meter, self._autocast():
                whole = PretendedInput(x, 2 if self.axis == "spatial" else 0, self.source)
                returned = self.arguments.call(self.module.forward, whole.read((0, shape[whole.dim])))
                outputs = [tensor for tensor in tensors_of(returned) if tensor.requires_grad]
                live = meter.live
                parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
                output_grads = [torch.empty_like(output) for output in outputs]
                if parameters and outputs:
                    torch.autograd.grad(outputs, parameters, output_grads, allow_unused=True)
            return Phase("native", 0, meter.peak, live, 0, 0, 0, meter.flops, meter.touched, meter.operations)

    def _new_tape(self) -> Tape:
        return Tape(self._shapes, self._fakes, self.device, self._player.parameters)

    @property
    def _fakes(self) -> FakeTensorMode | None:
        return self.mode if isinstance(self.mode, FakeTensorMode) else None

    def _autocast(self) -> Any:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast, cache_enabled=False)


class _Recorder:
    def __init__(self, meter: ByteMeter, phases: list[Phase], call: PartitionedCall) -> None:
        self.meter, self.phases, self.call = meter, phases, call
        self.flops = self.touched = self.copied = self.operations = 0

    def __call__(self, name: str, segment: int) -> None:
        meter, store = self.meter, self.call.store
        self.phases.append(
            Phase(
                name,
                segment,
                meter.restart_peak(),
                meter.live,
                store.held_bytes,
                store.peak_bytes,
                meter.copied - self.copied,
                meter.flops - self.flops,
                meter.touched - self.touched,
                meter.operations - self.operations,
                self.call.boundary_bytes,
            )
        )
        self.flops, self.touched, self.copied = meter.flops, meter.touched, meter.copied
        self.operations = meter.operations
        store.peak_bytes = store.held_bytes


def _fake_copy(module: nn.Module, mode: Any, device: torch.device) -> nn.Module:
    """The module with fake parameters and buffers, whole ones under ZeRO-3."""
    memo: dict[int, Any] = {}
    with mode:
        for parameter in module.parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            fake = torch.empty(shape, dtype=parameter.dtype, device=device)
            memo[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for buffer in module.buffers():
            memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        for part in module.modules():
            for value in part.__dict__.values():  # a weight that a hook of torch's has computed
                if isinstance(value, Tensor) and id(value) not in memo:
                    memo[id(value)] = torch.empty(value.shape, dtype=value.dtype, device=device)
    # Every part's own class and state, without an engine's: FSDP2 forbids a deepcopy, and DeepSpeed's hooks would
    # gather the copy's parameters.
    parts = list(module.modules())
    for part in parts:
        memo[id(part)] = object.__new__(_own_class(part))
    for part in parts:
        state = {name: value for name, value in part.__dict__.items() if not OF_ENGINES.search(name)}
        if part is module:
            state.pop("forward", None)  # a partition's own is not the module's
        bare = memo[id(part)]
        nn.Module.__init__(bare)
        if is_compiled(part):
            state = {"training": part.training, "_modules": part._modules}
        computing = {"_forward_pre_hooks": weight_hooks(part)}
        parameters = {"_parameters": dict(part._parameters.items())}
        bare.__dict__.update(copy.deepcopy(state | parameters | computing, memo))
    return memo[id(module)]


class _Uncompiled(nn.Module):
    """The stand-in for what `torch.compile` made of a part: the part, under the same name."""

    _orig_mod: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules["_orig_mod"](*args, **kwargs)  # type: ignore[misc]


OF_ENGINES = re.compile(
    "_hooks(_|$)|^_compiled_call_impl$|^ds_inflight|^_(external_params|original_parameters)$|^__composable_api|^population_group"
)


def _own_class(module: nn.Module) -> Any:
    """The class that FSDP2, or the compiler, has replaced by one of its own."""
    if is_compiled(module):
        return _Uncompiled
    kinds = type(module).__mro__
    return kinds[2] if kinds[1].__name__ == "FSDPModule" else kinds[0]
