"""The Big-Layers paper's Figure 2: one ResNet-18 training step on one image of growing side, under a cap of memory.

Each method tries more and more until it fits: the planner with less and less of the cap as its budget, mode "paper"
with more and more of its maps in host memory. The methods take their steps in turn, repeat by repeat, so that a machine
whose speed drifts slows all of them; ratios are of medians, against native where native fits.

On a GPU the allocator is capped, and what runs out of memory does not fit. On a CPU the tensors of forward and backward
are counted instead (parameters, their optimizer's state and the image are not), and what exceeds the cap does not fit.
Mode "paper" is there given all its maps in host memory, which is the CPU's too: they are counted, and it fits.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from ds_wsi.partition import Handle, PartitionPlan, PartitionPolicy, partition_layers, plan_partition
from ds_wsi.partition.planning.rates import Rates, device_key, probe
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.memory import ByteMeter, DevicePeaks, device_peaks
from launch.benchmarks.table import Result

MODES = ("native", "planner", "paper")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)  # of the cap, the planner's budget: what an allocator wastes is not planned
PAPER_SHARES = tuple(0.5**power for power in range(9))  # of the cap: an eighth of it is the largest map on the GPU
COLORS = {"native": "#888888", "planner": "#3b6ea5", "paper": "#c4713b"}


class DoesNotFitError(Exception):
    """A training step that needs more memory than there is, and why."""


@dataclass(frozen=True)
class Machine:
    """Time, memory and caps of a GPU, or of a CPU in its place.

    Args:
        device: where it runs.
        dtype: of autocast; float32 for none.
    """

    device: torch.device
    dtype: torch.dtype

    @property
    def gpu(self) -> bool:
        """Whether it is one."""
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        """The device's name, for the result."""
        return device_key(self.device)

    @property
    def amp(self) -> torch.dtype | None:
        """The dtype of autocast, None for none."""
        return None if self.dtype == torch.float32 else self.dtype

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, where there is any."""
        return nullcontext() if self.amp is None else torch.autocast(self.device.type, dtype=self.amp)

    def cap(self, size: float | None) -> None:
        """Give the allocator `size` bytes of the GPU, None for all of it; a CPU's is not capped."""
        if self.gpu:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, (size or total) / total), self.device)

    def rest(self, *, host: bool = False) -> None:
        """Give back what nothing uses; `host`: pinned memory as well."""
        gc.collect()
        if self.gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            if host:
                torch._C._host_emptyCache()

    def resident(self, model: nn.Module) -> int:
        """Bytes that stay beside a step's own: on a GPU what is there, and the optimizer's state to come."""
        if not self.gpu:
            return 0
        state = 2 * sum(parameter.nbytes for parameter in model.parameters())
        return torch.cuda.memory_allocated(self.device) + state

    def timed(self, work: Callable[[], object]) -> tuple[float, DevicePeaks]:
        """Seconds, and bytes at most on a GPU (zeros on a CPU: counting would take time)."""
        if self.gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        work()
        if self.gpu:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        return seconds, device_peaks(self.device)


@dataclass
class Training:
    """A model in one mode, and its training steps.

    Args:
        machine: it runs on.
        model: everything that is trained.
        forward: the logits [1, classes], by `model`.
        handle: of the partition, if there is one.
        plan: of it, if it was planned.

    Attributes:
        peaks: what the GPU held at most in the last step.
        peak_bytes: of all steps so far; on a GPU active ones, which no other tensor could have had.
        loss: of the last step.
    """

    machine: Machine
    model: nn.Module
    forward: Callable[[], Tensor]
    handle: Handle | None = None
    plan: PartitionPlan | None = None
    peak_bytes: int = 0
    peaks: DevicePeaks = field(default_factory=DevicePeaks)
    loss: float = field(default=float("nan"))

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=1e-4)
        scaled = self.machine.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.machine.device.type, enabled=scaled)
        self.target = torch.ones(1, dtype=torch.long, device=self.machine.device)

    def step(self) -> float:
        """Take a training step; its seconds.

        Raises:
            DoesNotFitError: it ran out of memory, or failed (kernels that cannot index a tensor so large, say).
        """
        seconds, self.peaks = self._guarded(lambda: self.machine.timed(self._train))
        self.peak_bytes = max(self.peak_bytes, self.peaks.active)
        return seconds

    def count(self, cap_bytes: int, *, refuse: bool = True) -> None:
        """On a CPU: count the bytes of a forward and backward; on a GPU the steps themselves are watched.

        Raises:
            DoesNotFitError: they exceed the cap, and `refuse`.
        """
        if self.machine.gpu:
            return
        self.optimizer.zero_grad(set_to_none=True)
        with ByteMeter() as meter:
            self._guarded(self._backward)
        self.peak_bytes = meter.peak
        if refuse and meter.peak > cap_bytes:
            raise DoesNotFitError(f"{meter.peak:,} bytes, the cap is {cap_bytes:,}")

    def _train(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _backward(self) -> None:
        with self.machine.autocast():
            logits = self.forward()
        loss = F.cross_entropy(logits.float(), self.target)
        self.scaler.scale(loss).backward()
        self.loss = loss.detach().item()

    def _guarded(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one
            reason = f"{type(error).__name__}: {(str(error) or 'no memory').splitlines()[0][:200]}"
        self.optimizer.zero_grad(set_to_none=True)  # outside: a caught error's frames hold the activations
        self.machine.rest()
        raise DoesNotFitError(reason)


@dataclass
class _Setting:
    machine: Machine
    sides: list[int]
    modes: list[str]
    cap_bytes: int
    repeats: int
    warmups: int
    chunk: str
    minutes: float
    rates: Rates | None
    levels: dict[str, int]  # of SHARES and PAPER_SHARES: a larger image fits with no more than a smaller one


def measure(*, quick: bool, slides: Sequence[str] = (), options: Mapping[str, str] | None = None) -> Result:
    """Measure every side in every mode.

    Args:
        quick: sides of 256 to 512 px, one warm-up, three repeats.
        slides: none are read.
        options: sides (comma-separated), cap_gib, repeats, warmups, modes (comma-separated), dtype (float16, bfloat16,
            float32), chunk (rows of a chunk; "auto" lets the planner search, which takes minutes a side), minutes
            (after which no further side is begun).
    """
    del slides
    setting = _setting(quick, options)
    machine = setting.machine
    start, rows, skipped = time.monotonic(), [], {}
    machine.cap(setting.cap_bytes)
    try:
        for side in setting.sides:
            if time.monotonic() - start > 60 * setting.minutes:
                skipped[str(side)] = f"{setting.minutes:g} minutes were up"
                continue
            rows += _side(setting, side)
    finally:
        machine.cap(None)
    notes = {
        "device": machine.name,
        "precision": "float32, no autocast" if machine.amp is None else f"autocast to {str(machine.dtype)[6:]}",
        "cap_bytes": setting.cap_bytes,
        "repeats": setting.repeats,
        "warmups": setting.warmups,
        "peak": "active on the GPU" if machine.gpu else "counted tensors of forward and backward, paper's maps too",
        "skipped": skipped,
    }
    title = f"A ResNet-18 training step on one image, at most {setting.cap_bytes / 2**30:.3g} GiB"
    return Result(title, rows, [], lambda figure: draw(figure, rows, setting.cap_bytes), notes)


def read_options(options: Mapping[str, str] | None, defaults: Mapping[str, str]) -> dict[str, str]:
    """The options, the defaults where they say nothing.

    Raises:
        ValueError: there is no such option.
    """
    unknown = sorted(set(options or {}) - set(defaults))
    if unknown:
        raise ValueError(f"an option must be one of {', '.join(defaults)}, got {unknown[0]!r}")
    return {**defaults, **(options or {})}


def find_machine(dtype: str, cpu: str) -> Machine:
    """The GPU where there is one; `dtype` "auto" is float16 on it, and `cpu` on a CPU.

    Raises:
        ValueError: an unknown dtype, or float16 on a CPU.
    """
    gpu = torch.cuda.is_available()
    name = ("float16" if gpu else cpu) if dtype == "auto" else dtype
    if name not in DTYPES or (name == "float16" and not gpu):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)} (float16 on a GPU only), got {name!r}")
    if not gpu:
        torch.set_num_threads(1)
    return Machine(torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu"), DTYPES[name])


def _setting(quick: bool, options: Mapping[str, str] | None) -> _Setting:
    gpu = torch.cuda.is_available()
    defaults = {
        "sides": "256,384,512" if quick else ",".join(map(str, range(7_680, 13_825, 256))),
        "cap_gib": "24" if gpu and not quick else "0.08",
        "repeats": "3" if quick else "10",
        "warmups": "1" if quick else "5",
        "modes": ",".join(MODES),
        "dtype": "auto",
        "chunk": "",
        "minutes": "inf",
    }
    if gpu and quick:
        defaults["cap_gib"] = "1"
    found = read_options(options, defaults)
    modes = [mode.strip() for mode in found["modes"].split(",")]
    if not set(modes) <= set(MODES):
        raise ValueError(f"modes must be of {', '.join(MODES)}, got {found['modes']!r}")
    machine = find_machine(found["dtype"], cpu="bfloat16")
    return _Setting(
        machine=machine,
        sides=[int(side) for side in found["sides"].split(",")],
        modes=modes,
        cap_bytes=int(float(found["cap_gib"]) * 2**30),
        repeats=max(1, int(found["repeats"])),
        warmups=int(found["warmups"]),
        chunk=found["chunk"],
        minutes=float(found["minutes"]),
        rates=probe(machine.device) if machine.gpu else None,
        levels=dict.fromkeys(MODES, 0),
    )


def resnet18(machine: Machine, num_classes: int = 2) -> nn.Module:
    """The paper's network, the same weights each time."""
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=num_classes).train().to(machine.device)


def build(
    machine: Machine,
    mode: str,
    image: Tensor,
    budget: int | None,
    *,
    chunk: int | None = None,
    prepare: Callable[[Tensor], Tensor] | None = None,
    rates: Rates | None = None,
    search: str = "auto",
) -> Training:
    """A training of a ResNet-18 on one image.

    Args:
        machine: to run on.
        mode: one of `MODES`.
        image: [1, 3, side, side]; on the host too for "planner".
        budget: bytes for activations and gradients; of mode "paper", eight times the largest map on the device.
        chunk: rows a chunk, for the planner; None lets it search.
        prepare: of the image, whole or a chunk of it.
        rates: of the machine.
        search: the policy's mode, for "planner".

    Raises:
        DoesNotFitError: no plan does.
    """
    model = resnet18(machine)
    whole: Callable[[], Tensor] = lambda: image if prepare is None else prepare(image)  # noqa: E731
    if mode == "native":
        return Training(machine, model, lambda: model(whole().to(machine.device)))
    if mode == "paper":
        handle = partition_layers(model, PartitionPolicy(mode="paper", axis="spatial", gpu_budget_bytes=budget))
        return Training(machine, model, lambda: model(whole()), handle)
    policy = PartitionPolicy(mode=search, axis="spatial", gpu_budget_bytes=budget, chunk_size=chunk)
    plan = planned(machine, model, tuple(image.shape), policy, image.dtype if prepare is None else machine.dtype, rates)
    handle = partition_layers(model, plan, check=False)
    return Training(machine, model, lambda: model(image, prepare=prepare), handle, plan)


def planned(
    machine: Machine,
    model: nn.Module,
    shape: tuple[int, ...],
    policy: PartitionPolicy,
    dtype: torch.dtype,
    rates: Rates | None,
) -> PartitionPlan:
    """The plan.

    Raises:
        DoesNotFitError: there is none within the budgets, or searching for it failed.
    """
    start = time.monotonic()
    try:
        plan = plan_partition(
            model, shape, policy, dtype=dtype, autocast=machine.amp, device=machine.device, rates=rates
        )
    except (ValueError, RuntimeError) as error:
        reason = f"no plan: {str(error).splitlines()[0]}"
    else:
        logger.info("planned in %.1f s: %s", time.monotonic() - start, plan)
        return plan
    machine.rest()
    raise DoesNotFitError(reason)


def _side(setting: _Setting, side: int) -> list[dict[str, Any]]:
    """Every mode on an image of this side, their repeats in turn."""
    machine = setting.machine
    machine.rest(host=True)
    image = torch.rand(1, 3, side, side, device=machine.device)
    trainings: dict[str, Training] = {}
    seconds: dict[str, list[float]] = {mode: [] for mode in setting.modes}
    reasons: dict[str, str] = {}
    for mode in setting.modes:
        try:
            trainings[mode] = _fitted(setting, mode, image)
        except DoesNotFitError as error:
            reasons[mode] = str(error)
    for _ in range(setting.repeats):
        for mode in list(trainings):
            try:
                if machine.gpu and mode != "paper" and len(trainings) > 1:
                    machine.rest()  # one mode's cached blocks fragment the next one's
                    trainings[mode].step()
                seconds[mode].append(trainings[mode].step())
            except DoesNotFitError as error:
                reasons[mode] = str(error)
                del trainings[mode]
    found = []
    for mode in setting.modes:
        training = trainings.get(mode)
        took = median(seconds[mode]) if training else None
        row = {
            "side": side,
            "mode": mode,
            "seconds": took,
            "peak bytes": training.peak_bytes if training else None,
            "fits": "yes" if training else "no",
            "ratio": took / median(seconds["native"]) if took and "native" in trainings else None,
            "plan": _describe(training) if training else "",
            "why": reasons.get(mode, ""),
        }
        logger.info("%s", row)
        found.append(row)
    return found


def _fitted(setting: _Setting, mode: str, image: Tensor) -> Training:
    """A training that has taken its warm-ups.

    Raises:
        DoesNotFitError: nothing that is tried fits.
    """
    machine = setting.machine
    shares = {"planner": SHARES, "paper": PAPER_SHARES}.get(mode, (1.0,))
    if not machine.gpu:
        shares = {"planner": (1.0, *SHARES), "paper": PAPER_SHARES[-1:]}.get(mode, (1.0,))
    reason = "nothing was tried"
    while setting.levels[mode] < len(shares):
        try:
            return _attempt(setting, mode, image, int(shares[setting.levels[mode]] * setting.cap_bytes))
        except DoesNotFitError as error:
            reason = str(error)
        machine.rest(host=True)
        setting.levels[mode] += 1
    setting.levels[mode] = len(shares) - 1  # the next side says so itself
    raise DoesNotFitError(reason)


def _attempt(setting: _Setting, mode: str, image: Tensor, budget: int) -> Training:
    machine = setting.machine
    if mode == "planner":
        budget -= machine.resident(resnet18(machine))
        if budget < 1:
            raise DoesNotFitError("the image and the parameters alone exceed the cap")
    chunk = chunk_of(setting.chunk, image.shape[2])
    training = build(machine, mode, image, budget, chunk=chunk, rates=setting.rates)
    training.count(setting.cap_bytes, refuse=mode != "paper")
    for _ in range(max(1, setting.warmups) if machine.gpu else setting.warmups):
        training.step()
    return training


def chunk_of(option: str, side: int, most: int = 512) -> int | None:
    """Rows a chunk: as the option says, else about an eighth of the image and at most `most`; None for "auto"."""
    if option == "auto":
        return None
    return int(option) if option else max(8, min(most, 2 ** ((side // 8).bit_length() - 1)))


def _describe(training: Training) -> str:
    plan = training.plan
    if plan is None or plan.mode != "partitioned":
        return "" if plan is None else plan.mode
    return " ".join(segment.mode for segment in plan.segments)


def draw(figure: Figure, rows: Sequence[dict[str, Any]], cap_bytes: int) -> None:
    """Seconds and peak bytes over the side; what does not fit has no point."""
    left, right = figure.subplots(1, 2)
    for mode in MODES:
        points = [row for row in rows if row["mode"] == mode and row["fits"] == "yes"]
        style: dict[str, Any] = {"color": COLORS[mode], "marker": "o", "markersize": 3, "label": mode}
        left.plot([row["side"] for row in points], [row["seconds"] for row in points], **style)
        right.plot([row["side"] for row in points], [row["peak bytes"] / 2**30 for row in points], **style)
    right.axhline(cap_bytes / 2**30, color="black", linewidth=1, linestyle="--", label="cap")
    left.set_yscale("log")
    for axes, label in ((left, "seconds a step (median)"), (right, "peak memory, GiB")):
        axes.set_xlabel("side of the image, px")
        axes.set_ylabel(label)
        axes.legend(fontsize=8)
