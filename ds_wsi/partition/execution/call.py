"""Forward and backward of a program, segment by segment, pass by pass, chunk by chunk."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.partition.execution.aliases import CallTensors
from ds_wsi.partition.execution.chunk_pass import ChunkRunner, no_checkpoint
from ds_wsi.partition.execution.chunk_ranges import ChunkRanges
from ds_wsi.partition.execution.chunked_tensor import ChunkedTensor, StoredTensor
from ds_wsi.partition.execution.gradients import GradientSums, gradient_needs
from ds_wsi.partition.execution.host_store import HostStore
from ds_wsi.partition.execution.input_tensor import InputTensor
from ds_wsi.partition.execution.recomputed import RecomputedSegment
from ds_wsi.partition.execution.saved_on_host import SavedOnHost
from ds_wsi.partition.execution.segment_norms import SegmentNorms
from ds_wsi.partition.execution.stored import KEEP_GRAPHS, StoredSegment
from ds_wsi.partition.execution.versions import Guard, guards_of, name_changed
from ds_wsi.partition.graph.halo import Range
from ds_wsi.partition.graph.replay import Random
from ds_wsi.partition.graph.segments import Program, Segment
from ds_wsi.partition.module.arguments import Arguments
from ds_wsi.partition.module.surroundings import undisturbed

_Work = StoredSegment | RecomputedSegment


class PartitionedCall:
    """One call of a partitioned module: its forward, and its backward if there is one.

    Args:
        program: the program to run.
        x: input [N, ...] (or images [B, C, H, W]), on the module's device or on the host.
        bags: ranges of tiles that are a population each.
        prepare: applied to each chunk of the input on the device, without gradient.
        save: whether backward will follow.
        wants_input_grad: whether a gradient shall reach `x`.
        device: the device that computes.
        autocast: a context of the autocast settings in force at the call.
        track: whether running statistics are updated.
        store: the store of host memory; None makes one.
        phase: called at the end of each segment's forward and backward, with its index.
        simulated: whether the call is on fake tensors: no random numbers.
        pretended: the input of a simulated call, in place of `x` and `prepare`.
        arguments: the call's arguments beside the tiles.
    """

    def __init__(
        self,
        program: Program,
        x: Tensor,
        bags: list[Range],
        *,
        prepare: Callable[[Tensor], Tensor] | None,
        save: bool,
        wants_input_grad: bool,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        track: bool = True,
        store: HostStore | None = None,
        phase: Callable[[str, int], None] | None = None,
        simulated: bool = False,
        pretended: InputTensor | None = None,
        arguments: Arguments | None = None,
    ) -> None:
        self.program, self.bags, self.save, self.wants_input_grad = program, bags, save, wants_input_grad
        self.device, self.autocast, self.track = device, autocast, track
        self.batch = x.shape[0]
        self.arguments = arguments or Arguments()
        dim = 2 if program.rules is not None else 0
        self.random = Random(device, replayable=not simulated)
        self.store = store or HostStore(device)
        self.x: InputTensor | None = pretended or InputTensor(x, dim, device, prepare, self.store)
        self.sums = GradientSums()
        self.saved: list[_Work | None] = []  # what each segment keeps from forward to backward
        self.needs_grad = gradient_needs(program.traced, wants_input_grad)
        self.on_host = SavedOnHost(program.traced.module, self.store, x)
        self.tensors = CallTensors(program.traced.module, save=save)
        self._input = Guard(x, f"the input of {type(program.traced.module).__name__}")
        self._guards: list[list[Guard]] = []  # of each segment, from forward to backward
        self._simulated = simulated
        if self.x is not None and save and not simulated:
            self.x.check = self._input.check
        self.carrier: Tensor | None = None  # of its inputs, see `carrier_of`
        self.boundary_bytes = 0  # of the tensor between the last segment worked on and the next
        self.phase = phase or (lambda name, index: None)

    def forward(self) -> Tensor:
        """The module's output."""
        assert self.x is not None
        source: ChunkedTensor = self.x
        needs = self.wants_input_grad
        segments = self.program.segments
        graphs = self.save and any(segment.spec.mode in KEEP_GRAPHS for segment in segments)
        aliased = self.tensors.in_place() if graphs else nullcontext()
        with undisturbed(), self.autocast(), aliased:
            for index, segment in enumerate(segments):
                needs = needs or any(parameter.requires_grad for parameter in _parameters(segment))
                keep = self.save and needs
                follower = segments[index + 1].spec if index + 1 < len(segments) else None
                work = self._work(segment, source)
                out = work.ranges.make_value(segment.target, host=follower is not None and follower.host_input)
                work.forward(out, keep=keep)
                self.saved.append(work if keep else None)
                source = out
                self.boundary_bytes = out.device_bytes
                self.phase("forward", index)
        if self.x is not None and not self.save:
            self.x.clear()
        self.x = None
        if self.save and not self._simulated:
            self._guards = [guards_of(segment, self.tensors.names) for segment in segments]
        return out.whole()

    def backward(self, grad: Tensor) -> tuple[Tensor | None, dict[int, Tensor]]:
        """The input's gradient (None where it is not wanted) and the parameters', by id, summed over the chunks."""
        rows = self.program.segments[-1].in_rows
        input_grad: StoredTensor | None = None
        output_grad: ChunkedTensor = InputTensor(grad, 2 if rows else 0, self.device, None)
        ambient = self.random.read()
        self._input.armed = True
        with undisturbed(), self.autocast(), self.tensors.in_place():
            for index in reversed(range(len(self.program.segments))):
                work, self.saved[index] = self.saved[index], None
                if work is None:
                    break
                segment = self.program.segments[index]
                if self._guards and segment.spec.mode not in KEEP_GRAPHS:
                    for guard in self._guards[index]:
                        guard.check()
                host = segment.spec.host_input and index > 0  # the input's gradient is the caller's
                input_grad = work.ranges.make_value(segment.source, host=host, source=True)
                try:
                    work.backward(output_grad, input_grad)
                except RuntimeError as error:
                    named = name_changed(error, [self._input, *chain(*self._guards)])
                    if named is None:
                        raise
                    raise named from error
                output_grad.clear()
                work.source.clear()
                output_grad = input_grad
                self.boundary_bytes = input_grad.device_bytes
                self.phase("backward", index)
        self.random.write(ambient)
        x_grad = None
        if self.wants_input_grad and input_grad is not None and not input_grad.is_empty:  # a forward may cut it off
            x_grad = input_grad.whole()
        return x_grad, self.sums.by_id

    def _work(self, segment: Segment, source: ChunkedTensor) -> _Work:
        kind = RecomputedSegment if segment.spec.mode == "recompute" else StoredSegment
        return kind(self.runner(segment), source, self.sums)

    def runner(self, segment: Segment) -> ChunkRunner:
        """What runs the chunks of a segment."""
        return ChunkRunner(
            segment,
            self.ranges(segment),
            SegmentNorms(segment, len(self.bags), self.device, self.batch if self.track else None, self.tensors),
            self.random,
            self.needs_grad,
            self.on_host.saving if segment.spec.mode == "offload" else no_checkpoint,
            self.arguments,
            self.tensors,
        )

    def ranges(self, segment: Segment) -> ChunkRanges:
        """A segment's chunks."""
        return ChunkRanges(segment, self.program.heights, self.batch, self.bags, self.store)


def _parameters(segment: Segment) -> Iterator[nn.Parameter]:
    yield from segment.whole.parameters
    for node in segment.sites:
        yield from segment.sites[node].leaf.parameters()


def bag_ranges(cu_seqlens: Tensor | None, batch: int, *, shared: bool = False) -> list[Range]:
    """The populations of a stack: its bags, or all of it as one; `shared`: empty ones too, other ranks hold tiles."""
    if cu_seqlens is None:
        return [(0, batch)]
    bounds = [int(bound) for bound in cu_seqlens.tolist()]
    if bounds[0] != 0 or bounds[-1] != batch or any(one > two for one, two in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tiles, {batch}, got {bounds}")
    return [(one, two) for one, two in pairwise(bounds) if two > one or shared]
