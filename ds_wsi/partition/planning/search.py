"""The search for a plan: every segment's cost in every mode from small simulated calls, then the best combination.

Simulated calls with 3 chunks, with 4 and with 3 of double size give what a segment keeps, peaks at, computes and copies
(costs.py). Combinations of modes are then compared by a sum over segments (choice.py): they are the same whatever the
budgets. The first of them, in order of time, that a simulated call as a whole shows to be within the budgets is the
plan: with a larger budget it is the same or an earlier one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import cached_property
from heapq import heapify, heappop, heappush
from itertools import count
from math import ceil
from typing import Any

import torch
from torch import fx, nn

from ds_wsi.norms.roles import is_shared
from ds_wsi.partition.execution.input_tensor import InputCost
from ds_wsi.partition.graph.segments import Program, SegmentSpec
from ds_wsi.partition.module.arguments import Arguments
from ds_wsi.partition.module.devices import device_of
from ds_wsi.partition.module.hooks import uncompiled
from ds_wsi.partition.planning.choice import Choice, combine, overlapped, seconds_of
from ds_wsi.partition.planning.costs import TILES, SegmentCost, SegmentMode, extrapolated, fitted, profile
from ds_wsi.partition.planning.depends import Asked, NoKeyError, key_of
from ds_wsi.partition.planning.kept import Budgets, Found, Searched, find, made
from ds_wsi.partition.planning.plan import PartitionPlan, SegmentPlan, gib
from ds_wsi.partition.planning.rates import Rates, find_rates
from ds_wsi.partition.planning.simulate import Phase, Simulator
from ds_wsi.partition.policy import MODES, PartitionPolicy
from ds_wsi.runtime.memory import free_bytes, free_host_bytes

PAPER_CHUNK = {"batch": 32, "spatial": 256}
_WHOLE = (SegmentMode("recompute"),)  # the least memory of all: the whole module again from its input


def plan_partition(
    module: nn.Module,
    input_shape: Sequence[int],
    policy: PartitionPolicy | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    device: torch.device | None = None,
    rates: Rates | None = None,
    source: InputCost | None = None,
    arguments: Arguments | None = None,
) -> PartitionPlan:
    """Decide how to partition `module` for a training step on an input of this shape; nothing is computed or changed.

    A plan that was made before of the same module, shapes, policy, rates and versions is read from the user's cache
    folder (`PartitionPolicy.keep_plans`).

    Args:
        module: the encoder, in the mode (train or eval) that it will run in.
        input_shape: [N, C, H, W].
        policy: budgets and what is fixed already; its defaults otherwise. Budgets cover what the step allocates:
            activations and the parameters' gradients, not the input and the parameters themselves.
        dtype: the input's dtype.
        autocast: torch.float16 or torch.bfloat16 under mixed precision.
        device: the device whose kernels and rates are assumed; the module's own by default.
        rates: the device's rates; by default measured ones where `ds-wsi plan --probe` has run, assumed ones otherwise.
        source: what a tile, or a row, of the input takes on the device before the encoder sees it; nothing by default.
        arguments: the forward's arguments beside the input; none by default.

    Returns:
        The fastest plan within the budgets; `mode` "native" where the module fits as it is.

    Raises:
        ValueError: no plan fits; says how many bytes are missing.
    """
    return find_plan(
        *(module, input_shape, policy),
        dtype=dtype,
        autocast=autocast,
        device=device,
        rates=rates,
        source=source,
        arguments=arguments,
    ).plan


def find_plan(
    module: nn.Module,
    input_shape: Sequence[int],
    policy: PartitionPolicy | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    device: torch.device | None = None,
    rates: Rates | None = None,
    source: InputCost | None = None,
    arguments: Arguments | None = None,
) -> Found:
    """What `plan_partition` returns, and whether it was read or made, in how many seconds."""
    policy = policy or PartitionPolicy()
    module = uncompiled(module)
    shape = tuple(int(size) for size in input_shape)
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"input_shape must be [N, ...], all positive, got {list(shape)}")
    device = device or device_of(module, torch.device("cpu"))
    if policy.mode in ("paper", "native"):
        size = policy.chunk_size or (PAPER_CHUNK[policy.axis] if policy.mode == "paper" else 0)
        plan = PartitionPlan((), policy.axis, policy.bn_population, shape, mode=policy.mode, chunk_size=size)
        return Found(plan, 0.0, why="nothing was searched for")
    rates = rates or find_rates(device)
    gpu = policy.gpu_budget_bytes or _free_device_bytes(device)
    budgets = Budgets(gpu, policy.host_budget_bytes or free_host_bytes())
    asked = Asked(module, shape, policy, dtype, autocast, device, rates, source, arguments)

    def search() -> Searched:
        return Planner(*(getattr(asked, entry.name) for entry in fields(asked))).searched(budgets)

    if not policy.keep_plans:
        return made(search, "as was asked")
    try:
        key = key_of(asked)
    except NoKeyError as error:
        return made(search, f"it depends on what has no name: {error}")
    return find(key, budgets, search)


class Planner:
    """Plans of one module for one input shape under any budgets; see `plan_partition`."""

    def __init__(
        self,
        module: nn.Module,
        shape: tuple[int, ...],
        policy: PartitionPolicy,
        dtype: torch.dtype,
        autocast: torch.dtype | None,
        device: torch.device,
        rates: Rates,
        source: InputCost | None,
        arguments: Arguments | None = None,
    ) -> None:
        self.shape, self.policy, self.rates, self.device = shape, policy, rates, device
        # Ranks must not mix native SyncBatchNorm's collectives with ours.
        self.synchronised = is_shared(module)
        self.overlaps = device.type == "cuda"
        # Without the card its kernels cannot be pretended; the CPU's save about the same.
        pretended = device if device.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")
        self.simulator = Simulator(
            module, policy.axis, pretended, dtype, autocast, overlaps=self.overlaps, source=source, arguments=arguments
        )
        self.nvme_budget = policy.nvme_bytes()
        self.gpu_budget = self.memory_budget = self.host_budget = 0  # as of `within`
        self.program: Program = self.simulator.program((SegmentSpec("", "lean", 1),), self._sample(1))
        self.cuts: list[fx.Node] = self.program.candidates()
        self._fits: dict[tuple[SegmentMode, ...], list[tuple[SegmentCost, SegmentCost, SegmentCost]]] = {}
        self._simulations: dict[tuple[SegmentSpec, ...], list[Phase]] = {}

    def within(self, gpu_budget: int, host_budget: int) -> PartitionPlan:
        """The fastest plan within these budgets; what was simulated for others is known.

        Raises:
            ValueError: none fits.
        """
        return self.searched(Budgets(gpu_budget, host_budget)).plan

    def searched(self, budgets: Budgets) -> Searched:
        """The same, and the budgets whose plan it is too: those between these and what it needs.

        Under smaller ones nothing faster fits that does not fit under these.

        Raises:
            ValueError: none fits.
        """
        policy, gpu_budget = self.policy, budgets.gpu
        self.gpu_budget, self.memory_budget = gpu_budget, budgets.host
        self.host_budget = budgets.host + self.nvme_budget
        native = self.native
        as_it_is = policy.mode == "auto" and not policy.compile and not self.synchronised
        if as_it_is and native.peak <= gpu_budget:
            plan = self._finished((), mode="native", peak_bytes=native.peak, seconds=self._seconds(native))
            return Searched(plan, Budgets(2**62, 2**62), Budgets(native.peak, 0))
        tried = []
        for choice, size in self._candidates():
            plan = self._simulated(choice.modes, size)
            seconds = self._seconds_on_disk(choice) if policy.mode == "auto" else plan.seconds
            # A partition does what the module does, and more.
            plan = replace(plan, seconds=max(seconds, self._seconds(native)) if as_it_is else seconds)
            if plan.peak_bytes <= gpu_budget and plan.host_bytes <= self.host_budget:
                # Where these are smaller than a choice's sums it is passed over, but for the least of all.
                sums = (0.0, 0.0) if self._is_least(choice, size) else (choice.peak, choice.host_peak)
                least = Budgets(max(plan.peak_bytes, ceil(sums[0])), max(plan.host_bytes, ceil(sums[1])))
                return Searched(plan, budgets, least)
            tried.append(plan)
        plan = min(
            tried, key=lambda one: max(0, one.peak_bytes - self.gpu_budget) + max(0, one.host_bytes - self.host_budget)
        )
        raise ValueError(
            f"the budgets must hold a training step on {list(self.shape)}, got {gib(self.gpu_budget)} on the device "
            f"and {gib(self.host_budget)} on the host: the nearest plan lacks "
            f"{max(0, plan.peak_bytes - self.gpu_budget):,} bytes on the device and "
            f"{max(0, plan.host_bytes - self.host_budget):,} on the host (mode {policy.mode}, chunks of "
            f"{plan.segments[0].chunk_size}; the device's budget holds the parameters' gradients too). "
            "HINT: raise the budget that lacks them, or give a smaller input."
        )

    @cached_property
    def native(self) -> Phase:
        """The step of the module as it is."""
        return self.simulator.native(self.shape)

    # --------------------------------------------------------------------------------------- candidates

    def _candidates(self) -> Iterator[tuple[Choice, int]]:
        """Modes of the segments and a chunk size, the fastest first, of those whose sums are within the budgets.

        The least of all is always one: sums are estimates. The whole module's costs take long to find (each norm is a
        pass over all before it), and are found when nothing else is as fast as their bound.
        """
        number = count()  # of two that are as fast and need as much the one of larger chunks comes first
        waiting: list[tuple[float, float, int, int, Choice | None]] = [
            (self._seconds_on_disk(choice), choice.peak, next(number), size, choice) for choice, size in self._pool
        ]
        if self.cuts and self.policy.mode == "auto":
            waiting += [(seconds, 0.0, next(number), size, None) for size, seconds in self._whole_at_least.items()]
        heapify(waiting)
        while waiting:
            *_, size, choice = heappop(waiting)
            if choice is None:
                whole = self._whole(size)
                heappush(waiting, (whole.seconds, whole.peak, next(number), size, whole))
            elif self._is_least(choice, size) or (
                choice.peak <= self.gpu_budget and choice.host_peak <= self.host_budget
            ):
                yield choice, size

    def _is_least(self, choice: Choice, size: int) -> bool:
        """Whether it is the candidate that needs least of all."""
        return choice.modes == _WHOLE and size == self._chunk_sizes()[-1]

    @cached_property
    def _pool(self) -> list[tuple[Choice, int]]:
        """All candidates but the whole module's, whatever the budgets."""
        if self.policy.mode != "auto":
            segments = 1 if self.policy.mode == "recompute" else len(self.cuts) + 1
            modes = (_uniform(self.policy.mode),) * segments
            return [(Choice(modes, 0.0, 0.0, 0.0), size) for size in self._chunk_sizes()]
        kinds = [*map(_uniform, MODES), SegmentMode("checkpoint", True)]
        if not self.cuts:
            kinds = [SegmentMode(mode) for mode in ("keep", "recompute", "offload")]
        pool = []
        for size in self._chunk_sizes():
            costs = {kind: self._costs((kind,) * (len(self.cuts) + 1), size) for kind in kinds}
            pool += [(choice, size) for choice in combine(costs, self.rates, overlaps=self.overlaps)]
        return pool

    @cached_property
    def _whole_at_least(self) -> dict[int, float]:
        """Seconds of the whole module again from its input, by chunk size: not fewer than these."""
        return {size: self._least_of_whole(size) for size in self._chunk_sizes()}

    def _least_of_whole(self, size: int) -> float:
        """Segment by segment, and a forward of a segment more for every level of norms that is not its own.

        The norms after a segment need it in forward and in backward, those before it in backward.
        """
        count = len(self.cuts) + 1
        seconds = sum(map(self._seconds, self._costs(_WHOLE * count, size)))
        if self.policy.axis == "spatial":  # there no cost is kept for the next size: others would be simulated anew
            return seconds
        kept, rebuilt = (self._costs((SegmentMode(mode),) * count, size) for mode in ("keep", "checkpoint"))
        specs = self._specs((SegmentMode("checkpoint"),) * count, TILES)
        segments = self.simulator.program(specs, self._sample(TILES)).segments
        levels = [sum(bool(level.barriers) for level in segment.levels) for segment in segments]
        for index, (without, with_it) in enumerate(zip(kept, rebuilt, strict=True)):
            forward = replace(
                without,
                flops=max(0.0, with_it.flops - without.flops),
                touched=max(0.0, with_it.touched - without.touched),
                operations=max(0.0, with_it.operations - without.operations) / 2,  # the rest may be the bookkeeping's
            )
            passes = 2 * sum(levels[index + 1 :]) + sum(levels[:index])
            seconds += passes * self._seconds(forward)
        return seconds

    def _whole(self, size: int) -> Choice:
        (choice,) = combine({_WHOLE[0]: self._costs(_WHOLE, size)}, self.rates, overlaps=self.overlaps)
        return replace(choice, modes=_WHOLE)  # on the spatial axis the native tail was a segment of its own

    def _chunk_sizes(self) -> list[int]:
        if self.policy.chunk_size:
            return [self.policy.chunk_size]
        if self.policy.axis == "spatial":
            return [size for size in (512, 256, 128, 64, 32, 16) if size <= self.shape[2] // 4] or [8]
        return [2**power for power in range(8, -1, -1) if 2**power <= self.shape[0]]

    def _costs(self, modes: tuple[SegmentMode, ...], size: int) -> list[SegmentCost]:
        """The costs of every segment in these modes, all the same, for the whole input in chunks of `size`."""
        if self.policy.axis == "spatial":
            return profile(self.simulator.run(self._specs(modes, size), self.shape), modes[0])
        if modes not in self._fits:
            runs = []
            for chunk, chunks in ((TILES, 3), (TILES, 4), (2 * TILES, 3)):  # 3: first, middle, last
                phases = self.simulator.run(self._specs(modes, chunk), (chunk * chunks, *self.shape[1:]))
                runs.append(profile(phases, modes[0]))
            self._fits[modes] = list(zip(*runs, strict=True))
        return [fitted(*three, size, self.shape[0]) for three in self._fits[modes]]

    def _specs(self, modes: tuple[SegmentMode, ...], size: int) -> tuple[SegmentSpec, ...]:
        names = [*(node.name for node in self.cuts), ""] if len(modes) > 1 else [""]
        return tuple(
            SegmentSpec(name, mode, size, host_input) for name, (mode, host_input) in zip(names, modes, strict=True)
        )

    # -------------------------------------------------------------------------------------- predictions

    def _sample(self, tiles: int) -> tuple[int, ...]:
        return self.shape if self.policy.axis == "spatial" else (tiles, *self.shape[1:])

    def _phases(self, specs: tuple[SegmentSpec, ...]) -> list[Phase]:
        """Simulated whole where it is small, else extrapolated phase by phase."""
        if specs not in self._simulations:
            size = specs[0].chunk_size
            few, many = 3 * size, 4 * size
            if self.policy.axis == "spatial" or self.shape[0] <= many:
                self._simulations[specs] = self.simulator.run(specs, self.shape)
            else:
                low, high = (self.simulator.run(specs, self._sample(tiles)) for tiles in (few, many))
                self._simulations[specs] = extrapolated(low, high, (self.shape[0] - few) / size)
        return self._simulations[specs]

    def _simulated(self, modes: tuple[SegmentMode, ...], size: int) -> PartitionPlan:
        """The plan with its predictions."""
        specs = self._specs(modes, size)
        phases = self._phases(specs)
        parts = len(phases) // 2  # on the spatial axis the native tail may have added a segment
        costs = profile(phases, None)
        compute = [self._seconds(cost) for cost in costs]
        link = [cost.copied / self.rates.link for cost in costs]
        named = list(specs) if len(specs) == parts else [*specs[:-1], *specs[-1:] * (parts - len(specs) + 1)]
        segments = tuple(
            SegmentPlan(
                *(
                    spec.last,
                    spec.mode,
                    spec.chunk_size,
                    spec.host_input,
                    int(max(0, cost.kept)),
                    max(0, phases[index].host - (phases[index - 1].host if index else 0)),
                ),
                max(phases[index].peak, phases[2 * parts - 1 - index].peak),
                max(one, two) if self.overlaps else one + two,
            )
            for index, (spec, cost, one, two) in enumerate(zip(named, costs, compute, link, strict=True))
        )
        names = [spec.last or "output" for spec in named]
        host = max(phase.host_peak for phase in phases)
        return self._finished(
            segments[: len(specs) - 1] + segments[-1:],
            mode="partitioned",
            peak_bytes=max(phase.peak for phase in phases),
            host_bytes=host,
            seconds=max(self._disk_seconds(host), overlapped(sum(compute), sum(link), overlaps=self.overlaps)),
            timeline=tuple((f"{phase.name} {names[phase.segment]}", phase.peak) for phase in phases),
        )

    def _finished(self, segments: tuple[SegmentPlan, ...], **values: Any) -> PartitionPlan:
        return PartitionPlan(
            *(segments, self.policy.axis, self.policy.bn_population, self.shape),
            compile=self.policy.compile,
            native_peak_bytes=self.native.peak,
            native_seconds=self._seconds(self.native),
            gpu_budget_bytes=self.gpu_budget,
            host_budget_bytes=self.memory_budget,
            nvme_path=self.policy.nvme_path,
            nvme_budget_bytes=self.nvme_budget,
            rates_measured=self.rates.measured,
            **values,
        )

    def _seconds(self, cost: SegmentCost | Phase) -> float:
        return seconds_of(cost, self.rates)

    def _seconds_on_disk(self, choice: Choice) -> float:
        """Seconds of the choice, where what host memory does not hold is written and read beside the computing."""
        return max(choice.seconds, self._disk_seconds(choice.host_peak))

    def _disk_seconds(self, host: float) -> float:
        return 2 * max(0, host - self.memory_budget) / self.rates.disk if self.nvme_budget else 0.0


def _uniform(mode: str) -> SegmentMode:
    """The mode as of a module whose segments are all in it: "stream" has their inputs on the host."""
    return SegmentMode(mode, mode == "stream")


def _free_device_bytes(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return 2**62
    return int(0.9 * free_bytes(device))
