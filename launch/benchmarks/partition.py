"""Partitioned encoders against the plain ones, the paper's method and what practitioners use: time and bytes.

All methods of a case take a training step in turn, repeat by repeat, on the same input, so that a machine whose speed
drifts slows all of them; what is compared is the median of the repeats' ratios. Bytes are what the step allocates at
most beyond the parameters' gradients.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ds_wsi.partition import PartitionPlan, PartitionPolicy, partition_layers, plan_partition
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.memory import ByteMeter
from launch.benchmarks.peers import (
    lightstream_module,
    lightstream_stream,
    native,
    save_on_cpu,
    torch_checkpoint,
)
from launch.benchmarks.table import Bound, Result

RECOMPUTE_BOUND = 1.40
QUARTER_TIME_BOUND = 1.9
QUARTER = 0.25
# The median of three ratios of one ViT step, 1.32 by eleven, was 1.13 to 1.45 on a quiet machine: too wide for a bound.
BOUND_REPEATS = 11

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Case:
    """One encoder on one input, and what is tried on it.

    Attributes:
        modes: our modes; "quarter" is the planner's choice within a quarter of native's activation bytes, nothing in
            host memory.
        slow: methods timed once, because they take many times native.
        bounded: the method whose time has a bound; it and native are timed at least `BOUND_REPEATS` times.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    modes: tuple[str, ...]
    chunk_size: int
    axis: str = "batch"
    peers: tuple[str, ...] = ("torch checkpoint", "save_on_cpu")
    slow: tuple[str, ...] = ()
    bounded: str = ""
    stream_px: int = 0


def measure(*, quick: bool, slides: Sequence[str] = (), options: Mapping[str, str] | None = None) -> Result:
    """Measure every case on one thread; `quick` in a few minutes."""
    del slides
    torch.set_num_threads(1)
    torch.manual_seed(0)
    repeats = int((options or {}).get("repeats", 3 if quick else 7))
    rows: list[dict[str, Any]] = []
    notes: dict[str, Any] = {"repeats": repeats, "repeats where a bound is": max(repeats, BOUND_REPEATS), "skipped": {}}
    for case in _cases(quick):
        rows += _run(case, repeats, notes["skipped"])
    return Result(
        "Training steps of partitioned encoders", rows, _bounds(rows), lambda figure: _draw(figure, rows), notes
    )


def _cases(quick: bool) -> list[_Case]:
    our_modes = ("keep", "lean", "checkpoint", "recompute", "offload", "stream")
    count = 1 if quick else 2
    return [
        _Case(
            "ViT-tiny, 224 px",
            lambda: timm.create_model("vit_tiny_patch16_224", num_classes=0),
            (16 * count, 3, 224, 224),
            ("keep", "recompute", "offload"),
            chunk_size=8,
            bounded="recompute",
        ),
        _Case(
            "ConvNeXt-tiny, 96 px",
            lambda: timm.create_model("convnext_tiny", num_classes=0),
            (32 * count, 3, 96, 96),
            ("keep", "recompute", "offload", "paper"),
            chunk_size=16,
            bounded="recompute",
        ),
        _Case(
            "ResNet-18, train-mode BatchNorm, 128 px",
            lambda: timm.create_model("resnet18", num_classes=0),
            (64, 3, 128, 128),
            (*our_modes, "quarter", "paper"),
            chunk_size=16,
            slow=("recompute", "paper") if quick else ("recompute",),
            bounded="quarter",
        ),
        _Case(
            "ResNet-18 to layer 3, eval-mode norms, one image",
            lambda: lightstream_module(3),
            (1, 3, 1024, 1024),
            (*our_modes, "paper"),
            chunk_size=32,
            axis="spatial",
            peers=("torch checkpoint", "save_on_cpu", "lightstream"),
            stream_px=768,
        ),
    ]


class _Methods:
    """The methods of a case, each with a copy of its encoder, and what a training step of one is.

    Args:
        case: the case; methods that are not installed, or refuse the encoder, are left out.
        skipped: "case: method" -> why it is left out, added to.
    """

    def __init__(self, case: _Case, skipped: dict[str, str]) -> None:
        module = case.build()
        self.case, self.x = case, torch.randn(case.shape)
        self.gradients = sum(parameter.numel() * 4 for parameter in module.parameters() if parameter.requires_grad)
        self.modules: dict[str, nn.Module] = {}
        self.steps: dict[str, Step] = {}
        for name in ("native", *case.modes, *case.peers):
            module_copy = copy.deepcopy(module)
            try:
                self.steps[name] = _prepared(case, name, module_copy, self.gradients)
            except (ImportError, ValueError) as error:
                skipped[f"{case.name}: {name}"] = str(error)
                logger.info("%s: %s is skipped: %s", case.name, name, error)
                continue
            self.modules[name] = module_copy
        with torch.no_grad():
            weights = torch.randn_like(module(self.x[:2] if case.axis == "batch" else self.x))
        shape = weights.shape if case.axis == "spatial" else (case.shape[0], weights.shape[1])
        self.weights = torch.randn(shape)

    def step(self, name: str) -> None:
        """Forward and backward of a method, whose encoder then holds the gradients."""
        self.modules[name].zero_grad(set_to_none=True)
        self._backward(name)

    def _backward(self, name: str) -> None:
        (self.steps[name](self.x) * self.weights).sum().backward()

    def measure_bytes(self, name: str) -> tuple[int, Tensor]:
        """What a step allocates at most beyond the gradients, in bytes; and its gradients in one, float64."""
        module = self.modules[name]
        if name not in self.case.slow:
            self.step(name)  # traces, plans, and warms up
            module.zero_grad(set_to_none=True)
        elif self.case.axis == "batch":
            self.steps[name](self.x[:8]).sum().backward()
            module.zero_grad(set_to_none=True)
        with ByteMeter() as meter:
            self._backward(name)
        gradient = _flat_gradient(module)
        module.zero_grad(set_to_none=True)
        return meter.peak - self.gradients, gradient

    def measure_seconds(self, repeats: int) -> dict[str, list[float]]:
        """The time of each method's steps, which are taken in turn; slow methods take one."""
        case = self.case
        seconds: dict[str, list[float]] = {name: [] for name in self.steps}
        for repeat in range(max(repeats, BOUND_REPEATS)):
            for name in self.steps:
                n_steps = 1 if name in case.slow else repeats
                if repeat >= n_steps and not (case.bounded and name in ("native", case.bounded)):
                    continue
                start = time.perf_counter()
                self.step(name)
                seconds[name].append(time.perf_counter() - start)
        return seconds


def _run(case: _Case, repeats: int, skipped: dict[str, str]) -> list[dict[str, Any]]:
    methods = _Methods(case, skipped)
    measured = {name: methods.measure_bytes(name) for name in methods.steps}
    native_bytes, reference = measured["native"]
    seconds = methods.measure_seconds(repeats)
    rows = []
    for name, (peak, gradient) in measured.items():
        ratio = median(
            method_s / native_s for method_s, native_s in zip(seconds[name], seconds["native"], strict=False)
        )
        difference = (gradient - reference).norm() / reference.norm()
        rows.append(
            {
                "case": case.name,
                "method": name,
                "seconds": median(seconds[name]),
                "time over native": ratio,
                "activation MiB": peak / 2**20,
                "bytes over native": peak / native_bytes,
                "gradient difference": float(difference),
            }
        )
        logger.info("%s, %s: %.2f x time, %.2f x bytes", case.name, name, ratio, rows[-1]["bytes over native"])
    return rows


def _prepared(case: _Case, name: str, module: nn.Module, gradients: int) -> Step:
    """The method's forward; `module` receives the gradients."""
    if name == "native":
        return native(module)
    if name == "torch checkpoint":
        return torch_checkpoint(module)
    if name == "save_on_cpu":
        return save_on_cpu(module)
    if name == "lightstream":
        return lightstream_stream(module, case.shape[2], case.stream_px)
    partition: PartitionPlan | PartitionPolicy = (
        PartitionPolicy(mode=name, axis=case.axis, chunk_size=case.chunk_size)
        if (name != "quarter")
        else _quarter(case, module, gradients)
    )
    partition_layers(module, partition, check=False)  # the steps are measured, not the first call
    return module


def _quarter(case: _Case, module: nn.Module, gradients: int) -> PartitionPlan:
    plain = plan_partition(module, case.shape, PartitionPolicy(axis=case.axis))
    budget = gradients + int(QUARTER * (plain.native_peak_bytes - gradients))
    policy = PartitionPolicy(axis=case.axis, gpu_budget_bytes=budget, host_budget_bytes=1)
    return plan_partition(module, case.shape, policy)


def _flat_gradient(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).double()


def _bounds(rows: Sequence[dict[str, Any]]) -> list[Bound]:
    bounds = []
    for row in rows:
        if row["method"] == "recompute" and row["case"].startswith(("ViT", "ConvNeXt")):
            words = f"{row['case']}: recompute at most {RECOMPUTE_BOUND} x native's time"
            bounds.append(Bound(words, row["time over native"], RECOMPUTE_BOUND, at_most=True))
        if row["method"] == "quarter":
            words = f"{row['case']}: the planner's choice under a quarter of native's bytes, in at most"
            bounds.append(
                Bound(
                    f"{words} {QUARTER_TIME_BOUND} x its time",
                    row["time over native"],
                    QUARTER_TIME_BOUND,
                    at_most=True,
                )
            )
            bounds.append(Bound(f"{row['case']}: its bytes", row["bytes over native"], QUARTER, at_most=True))
    return bounds


def _draw(figure: Figure, rows: Sequence[dict[str, Any]]) -> None:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure.set_size_inches(11, 7)
    for axes, case in zip(figure.subplots(2, 2).flat, cases, strict=False):
        for row in (row for row in rows if row["case"] == case):
            is_ours = row["method"] not in ("native", "torch checkpoint", "save_on_cpu", "lightstream", "paper")
            colour = "#3b6ea5" if is_ours else "#888888"
            point = row["time over native"], row["bytes over native"]
            axes.scatter(*point, color=colour, s=25)
            axes.annotate(row["method"], point, xytext=(4, 3), textcoords="offset points", fontsize=7, color=colour)
        if max(row["time over native"] for row in rows if row["case"] == case) > 5:
            axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.set_ylim(bottom=0)
        axes.set_title(case, fontsize=9)
        axes.set_xlabel("time over native")
        axes.set_ylabel("activation bytes over native")
