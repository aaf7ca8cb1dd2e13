"""The search for a plan: every segment's cost in every mode from small simulated calls, then the best combination.

Simulated calls with 3 chunks, with 4 and with 3 of double size give what a segment keeps, peaks at, computes and copies
as alpha + beta chunk + gamma tiles. Plans are then compared by a sum over segments: forward and backward of a
segment peak at what the segments before it keep, plus its own. The plan that wins is simulated as a whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import torch
from torch import fx, nn

from ds_wsi.norms.roles import is_shared
from ds_wsi.partition.arguments import Arguments
from ds_wsi.partition.hooks import uncompiled
from ds_wsi.partition.plan import PartitionPlan, SegmentPlan, gib
from ds_wsi.partition.policy import MODES, PartitionPolicy
from ds_wsi.partition.program import Program, SegmentSpec
from ds_wsi.partition.rates import Rates, find_rates
from ds_wsi.partition.simulate import Phase, Simulator
from ds_wsi.partition.values import InputCost
from ds_wsi.runtime.memory import free_bytes, free_host_bytes

PAPER_CHUNK = {"batch": 32, "spatial": 256}
_ROUNDS = 6  # of the search, each within smaller budgets
_TILES = 4  # a chunk, in the small simulated calls


@dataclass(frozen=True)
class _Cost:
    """Of one segment in one mode; bytes and operations.

    Attributes:
        own: kept on the device from forward to backward, without its input (which `keeps_source` says it keeps).
        source, out: of its input and its output.
        forward, backward: peak of each, beyond what earlier segments keep, what gradients later ones have summed, and
            input and output with their gradients.
        gradients: of its parameters.
        host_extra: host memory at most, beyond what is kept there after forward.
        host, copied, flops, touched, operations: as of `Phase`.
    """

    own: float
    source: float
    out: float
    forward: float
    backward: float
    gradients: float
    host: float
    host_extra: float
    copied: float
    flops: float
    touched: float
    operations: float
    keeps_source: bool = True


@dataclass(frozen=True)
class _Choice:
    """Modes for the segments so far, and what they sum to."""

    kept: float = 0.0
    peak: float = 0.0
    host: float = 0.0
    host_peak: float = 0.0
    compute_s: float = 0.0
    link_s: float = 0.0
    modes: tuple[str, ...] = ()
    host_output: bool = False


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

    Args:
        module: the encoder, in the mode (train or eval) that it will run in.
        input_shape: [N, C, H, W].
        policy: budgets and what is fixed already; its defaults otherwise. Budgets cover what the step allocates:
            activations and the parameters' gradients, not the input and the parameters themselves.
        dtype: of the input.
        autocast: torch.float16 or torch.bfloat16 under mixed precision.
        device: whose kernels and rates are assumed; the module's own by default.
        rates: of the device; by default measured ones where `ds-wsi plan --probe` has run, assumed ones otherwise.
        source: what a tile, or a row, of the input takes on the device before the encoder sees it; nothing by default.
        arguments: of the forward, beside the input; none by default.

    Returns:
        The fastest plan within the budgets; `mode` "native" where the module fits as it is.

    Raises:
        ValueError: no plan fits; says how many bytes are missing.
    """
    policy = policy or PartitionPolicy()
    module = uncompiled(module)
    shape = tuple(int(size) for size in input_shape)
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"input_shape must be [N, ...], all positive, got {list(shape)}")
    device = device or next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    if policy.mode in ("paper", "native"):
        size = policy.chunk_size or (PAPER_CHUNK[policy.axis] if policy.mode == "paper" else 0)
        return PartitionPlan((), policy.axis, policy.bn_population, shape, mode=policy.mode, chunk_size=size)
    return _Planner(
        module, shape, policy, dtype, autocast, device, rates or find_rates(device), source, arguments
    ).plan()


class _Planner:
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
        arguments: Arguments | None,
    ) -> None:
        self.shape, self.policy, self.rates = shape, policy, rates
        # Ranks must not mix native SyncBatchNorm's collectives with ours.
        self.synchronised = is_shared(module)
        self.overlaps = device.type == "cuda"
        # Without the card its kernels cannot be pretended; the CPU's save about the same.
        pretended = device if device.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")
        self.simulator = Simulator(
            module, policy.axis, pretended, dtype, autocast, overlaps=self.overlaps, source=source, arguments=arguments
        )
        self.gpu_budget = policy.gpu_budget_bytes or _free_device_bytes(device)
        self.memory_budget = policy.host_budget_bytes or free_host_bytes()
        self.nvme_budget = policy.nvme_bytes()
        self.host_budget = self.memory_budget + self.nvme_budget
        self.program: Program = self.simulator.program((SegmentSpec("", "lean", 1),), self._sample(1))
        self.cuts: list[fx.Node] = self.program.candidates()
        self._fits: dict[str, list[tuple[_Cost, _Cost, _Cost]]] = {}

    def plan(self) -> PartitionPlan:
        """The fastest plan that fits.

        Raises:
            ValueError: none does.
        """
        policy = self.policy
        native = self.simulator.native(self.shape)
        if policy.mode == "auto" and native.peak <= self.gpu_budget and not policy.compile and not self.synchronised:
            seconds = self._seconds(native)
            return self._finished((), native, mode="native", peak_bytes=native.peak, seconds=seconds)
        tried: list[PartitionPlan] = []
        for modes, size in chain(self._combinations(tried), self._least(tried)):
            plan = self._simulated(self._specs(modes, size), native)
            if self._holds(plan):
                return plan
            tried.append(plan)
        plan = min(
            tried, key=lambda one: max(0, one.peak_bytes - self.gpu_budget) + max(0, one.host_bytes - self.host_budget)
        )
        raise ValueError(
            f"the budgets must hold a training step on {list(self.shape)}, got {gib(self.gpu_budget)} on the device "
            f"and {gib(self.host_budget)} on the host: the nearest plan lacks "
            f"{max(0, plan.peak_bytes - self.gpu_budget):,} bytes on the device and "
            f"{max(0, plan.host_bytes - self.host_budget):,} on the host (mode {policy.mode}, chunks of "
            f"{plan.segments[0].chunk_size}). HINT: raise the budget that lacks them, or give a smaller input."
        )

    # --------------------------------------------------------------------------------------- candidates

    def _combinations(self, tried: list[PartitionPlan]) -> Iterator[tuple[tuple[str, ...], int]]:
        """Modes of the segments and a chunk size, the most promising first; "+" marks an input kept on the host.

        The sum of costs takes each segment's peak for the sum of its parts, which need not fall together: where the
        simulated call, the last of `tried`, exceeds a budget, the search goes on within a smaller one.
        """
        sizes = self._chunk_sizes()
        count = len(self.cuts) + 1
        if self.policy.mode != "auto":
            modes = (_marked(self.policy.mode),) * (1 if self.policy.mode == "recompute" else count)
            yield from ((modes, size) for size in sizes)
            return
        device, host = float(self.gpu_budget), float(self.host_budget)
        for _ in range(_ROUNDS):
            found = [(choice, size) for size in sizes for choice in self._search(size, device, host)]
            found = [item for item in found if item[0].peak <= device and item[0].host_peak <= host]
            if not found:
                break
            choice, size = min(found, key=lambda item: self._choice_seconds(item[0]))
            yield choice.modes, size
            device *= min(1.0, 0.97 * self.gpu_budget / tried[-1].peak_bytes)
            host *= min(1.0, 0.97 * self.host_budget / max(1, tried[-1].host_bytes))

    def _least(self, tried: list[PartitionPlan]) -> Iterator[tuple[tuple[str, ...], int]]:
        """The least memory of all: the whole module again from its input, in the largest chunks that fit."""
        if self.policy.mode != "auto":
            return
        sizes = self._chunk_sizes()
        # A call with the smallest chunks first: if that does not fit, no other does, and each takes long to simulate.
        least = self._simulated(self._specs(("recompute",), sizes[-1]), self.simulator.native(self.shape))
        if self._holds(least):
            yield from ((("recompute",), size) for size in sizes)
        else:
            tried.append(least)

    def _holds(self, plan: PartitionPlan) -> bool:
        return plan.peak_bytes <= self.gpu_budget and plan.host_bytes <= self.host_budget

    def _chunk_sizes(self) -> list[int]:
        if self.policy.chunk_size:
            return [self.policy.chunk_size]
        if self.policy.axis == "spatial":
            return [size for size in (512, 256, 128, 64, 32, 16) if size <= self.shape[2] // 4] or [8]
        return [2**power for power in range(8, -1, -1) if 2**power <= self.shape[0]]

    def _search(self, size: int, device: float, host: float) -> list[_Choice]:
        """The best combination by the sum of costs: what no other one beats is carried from segment to segment."""
        modes = [_marked(mode) for mode in MODES]
        if not self.cuts:
            modes = ["keep", "recompute", "offload"]
        costs = {mode: self._costs(mode, size) for mode in modes}
        gradients = [cost.gradients for cost in costs[modes[0]]]
        places = costs[modes[0]]  # boundaries are the same in every mode
        choices = [_Choice()]
        count = len(self.cuts) + 1
        for index in range(count):
            later = sum(gradients[index + 1 :])
            source, out = places[index].source, places[index].out
            grown = []
            for choice in choices:
                for mode, cost in ((mode, costs[mode][index]) for mode in modes):
                    if choice.host_output and mode not in ("checkpoint", "recompute", "stream+"):
                        continue
                    if mode == "stream+" and index and not choice.host_output:
                        continue
                    for host_output in (False, True) if index + 1 < count and self.host_budget >= out else (False,):
                        here, there = (0 if choice.host_output else source), (0 if host_output else out)
                        kept = choice.kept + cost.own + (here if cost.keeps_source else 0)
                        forward = choice.kept + cost.forward + here + there
                        backward = choice.kept + cost.backward + 2 * here + there + later
                        # Out once, back for forward and backward, its gradient out and back.
                        moved = 5 * out if host_output and mode != "stream+" else 0
                        held = cost.host + (out if host_output else 0)
                        if mode == "stream+" and index + 1 < count:
                            held -= out  # its own calls had it there
                        extra = cost.host_extra
                        if mode != "stream+":  # the gradients of what lies there lie there too
                            extra += (source if choice.host_output else 0) + (out if host_output else 0)
                        name = mode if mode == "stream+" or not choice.host_output else f"{mode}+"
                        grown.append(
                            _Choice(
                                *(kept, max(choice.peak, forward, backward), choice.host + held),
                                max(choice.host_peak, choice.host + held + extra),
                                choice.compute_s + self._seconds(cost),
                                choice.link_s + (cost.copied + moved) / self.rates.link,
                                (*choice.modes, name),
                                host_output,
                            )
                        )
            fitting = [one for one in grown if one.peak <= device and one.host_peak <= host]
            if not fitting:
                return []
            choices = _pareto(fitting)
        return [min(choices, key=self._choice_seconds)]

    def _costs(self, mode: str, size: int) -> list[_Cost]:
        """Of every segment in this mode, for the whole input in chunks of `size`."""
        if self.policy.axis == "spatial":
            specs = self._specs((mode,) * (len(self.cuts) + 1), size)
            return _profile(self.simulator.run(specs, self.shape), mode)
        if mode not in self._fits:
            runs = []
            for chunk, count in ((_TILES, 3), (_TILES, 4), (2 * _TILES, 3)):  # 3: first, middle, last
                specs = self._specs((mode,) * (len(self.cuts) + 1), chunk)
                runs.append(_profile(self.simulator.run(specs, (chunk * count, *self.shape[1:])), mode))
            self._fits[mode] = list(zip(*runs, strict=True))
        return [_fitted(*three, size, self.shape[0]) for three in self._fits[mode]]

    def _specs(self, modes: tuple[str, ...], size: int) -> tuple[SegmentSpec, ...]:
        names = [*(node.name for node in self.cuts), ""] if len(modes) > 1 else [""]
        return tuple(
            SegmentSpec(name, mode.rstrip("+"), size, mode.endswith("+"))
            for name, mode in zip(names, modes, strict=True)
        )

    # -------------------------------------------------------------------------------------- predictions

    def _sample(self, tiles: int) -> tuple[int, ...]:
        return self.shape if self.policy.axis == "spatial" else (tiles, *self.shape[1:])

    def _simulated(self, specs: tuple[SegmentSpec, ...], native: Phase) -> PartitionPlan:
        """The plan with its predictions: simulated whole where it is small, else extrapolated phase by phase."""
        size = specs[0].chunk_size
        few, many = 3 * size, 4 * size
        if self.policy.axis == "spatial" or self.shape[0] <= many:
            phases = self.simulator.run(specs, self.shape)
        else:
            low, high = (self.simulator.run(specs, self._sample(tiles)) for tiles in (few, many))
            scale = (self.shape[0] - few) / size
            phases = _extrapolated(low, high, scale)
        count = len(phases) // 2  # on the spatial axis the native tail may have added a segment
        profile = _profile(phases, "")
        compute = [self._seconds(cost) for cost in profile]
        link = [cost.copied / self.rates.link for cost in profile]
        named = list(specs) if len(specs) == count else [*specs[:-1], *specs[-1:] * (count - len(specs) + 1)]
        segments = tuple(
            SegmentPlan(
                *(
                    spec.last,
                    spec.mode,
                    spec.chunk_size,
                    spec.host_input,
                    int(max(0, cost.own)),
                    max(0, phases[index].host - (phases[index - 1].host if index else 0)),
                ),
                max(phases[index].peak, phases[2 * count - 1 - index].peak),
                max(one, two) if self.overlaps else one + two,
            )
            for index, (spec, cost, one, two) in enumerate(zip(named, profile, compute, link, strict=True))
        )
        names = [spec.last or "output" for spec in named]
        host = max(phase.host_peak for phase in phases)
        disk = 2 * max(0, host - self.memory_budget) / self.rates.disk  # written and read beside the computing
        return self._finished(
            segments[: len(specs) - 1] + segments[-1:],
            native,
            mode="partitioned",
            peak_bytes=max(phase.peak for phase in phases),
            host_bytes=host,
            seconds=max(disk, max(sum(compute), sum(link)) if self.overlaps else sum(compute) + sum(link)),
            timeline=tuple((f"{phase.name} {names[phase.segment]}", phase.peak) for phase in phases),
        )

    def _finished(self, segments: tuple[SegmentPlan, ...], native: Phase, **values: Any) -> PartitionPlan:
        return PartitionPlan(
            *(segments, self.policy.axis, self.policy.bn_population, self.shape),
            compile=self.policy.compile,
            native_peak_bytes=native.peak,
            native_seconds=self._seconds(native),
            gpu_budget_bytes=self.gpu_budget,
            host_budget_bytes=self.memory_budget,
            nvme_path=self.policy.nvme_path,
            nvme_budget_bytes=self.nvme_budget,
            rates_measured=self.rates.measured,
            **values,
        )

    def _seconds(self, cost: _Cost | Phase) -> float:
        rates = self.rates
        return cost.flops / rates.flops + cost.touched / rates.memory + cost.operations * rates.launch

    def _choice_seconds(self, choice: _Choice) -> float:
        return max(choice.compute_s, choice.link_s) if self.overlaps else choice.compute_s + choice.link_s


def _marked(mode: str) -> str:
    return "stream+" if mode == "stream" else mode


def _profile(phases: list[Phase], mode: str) -> list[_Cost]:
    """Each segment's costs out of a simulated call; forwards come in order, then backwards in reverse."""
    count = len(phases) // 2
    forward, backward = phases[:count], list(reversed(phases[count:]))
    kept = [0, *(phase.live - phase.boundary for phase in forward)]  # by the segments before each
    summed = [*(phase.live - phase.boundary - before for phase, before in zip(backward, kept, strict=False)), 0]
    costs = []
    for index, (ahead, back) in enumerate(zip(forward, backward, strict=True)):
        source, out = (forward[index - 1].boundary if index else 0), ahead.boundary
        keeps = mode in ("lean", "checkpoint", "recompute")
        costs.append(
            _Cost(
                own=kept[index + 1] - kept[index] - (source if keeps else 0),
                source=source,
                out=out,
                forward=ahead.peak - kept[index] - source - out,
                backward=back.peak - kept[index] - summed[index + 1] - 2 * source - out,
                gradients=summed[index] - summed[index + 1],
                host=ahead.host - (forward[index - 1].host if index else 0) if mode in ("offload", "stream+") else 0,
                host_extra=max(ahead.host_peak, back.host_peak) - ahead.host if mode in ("offload", "stream+") else 0,
                copied=ahead.copied + back.copied,
                flops=ahead.flops + back.flops,
                touched=ahead.touched + back.touched,
                operations=ahead.operations + back.operations,
                keeps_source=keeps,
            )
        )
    return costs


def _fitted(few: _Cost, many: _Cost, wide: _Cost, size: int, tiles: int) -> _Cost:
    """Alpha + beta chunk + gamma tiles through (t, 3 t), (t, 4 t) and (2 t, 6 t), at (size, tiles)."""
    values = {}
    for entry in fields(_Cost):
        if entry.name == "keeps_source":
            continue
        one, two, three = (getattr(cost, entry.name) for cost in (few, many, wide))
        by_tile = (two - one) / _TILES
        by_chunk = (three - one) / _TILES - 3 * by_tile
        base = one - by_chunk * _TILES - by_tile * 3 * _TILES
        if entry.name == "operations":  # as many for a small chunk as for a large one
            values[entry.name] = max(0.0, one - 3 * (two - one)) + (two - one) * tiles / size
        else:
            values[entry.name] = max(0.0, base + by_chunk * size + by_tile * tiles)
    return replace(few, **values)


def _extrapolated(low: list[Phase], high: list[Phase], scale: float) -> list[Phase]:
    """The phases of a larger call, low + scale (high - low).

    A small call may peak where gradients of parameters are summed, a large one where activations are. What is alive
    when a phase begins grows evenly, so that the peak is at least that and what the phase added to it.
    """
    names = ("peak", "live", "host", "host_peak", "copied", "flops", "touched", "operations", "boundary")
    found: list[Phase] = []
    before = 0
    for one, two in zip(low, high, strict=True):
        grown: dict[str, Any] = {}
        for name in names:
            first, second = getattr(one, name), getattr(two, name)
            grown[name] = int(max(0, first + scale * (second - first)))
        alive = found[-1].live if found else 0
        grown["peak"] = max(grown["peak"], alive + two.peak - before)
        before = two.live
        found.append(replace(two, **grown))
    return found


def _pareto(choices: list[_Choice], limit: int = 48) -> list[_Choice]:
    """Those that no other one beats in time and in both memories; at most `limit`, spread over the memory kept."""
    best: list[_Choice] = []
    for one in sorted(choices, key=lambda choice: (choice.compute_s + choice.link_s, choice.kept)):
        beaten = any(
            other.kept <= one.kept
            and other.peak <= one.peak
            and other.host <= one.host
            and other.host_peak <= one.host_peak
            and other.compute_s <= one.compute_s
            and other.link_s <= one.link_s
            and other.host_output == one.host_output
            for other in best
        )
        if not beaten:
            best.append(one)
    if len(best) <= limit:
        return best
    best.sort(key=lambda choice: choice.kept)
    return [best[index * (len(best) - 1) // (limit - 1)] for index in range(limit)]


def _free_device_bytes(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return 2**62
    return int(0.9 * free_bytes(device))
