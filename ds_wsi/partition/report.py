"""A module tried in every mode of the partition: what is exact, what is refused and why, what it costs."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.partition.checking.case import Case
from ds_wsi.partition.checking.check import check_case, sample_of
from ds_wsi.partition.forward import PartitionedForward
from ds_wsi.partition.module.arguments import Arguments
from ds_wsi.partition.module.devices import device_of, refuse_devices
from ds_wsi.partition.module.outputs import tensors_of
from ds_wsi.partition.module.restored import Restored
from ds_wsi.partition.planning.plan import gib
from ds_wsi.partition.policy import MODES, PartitionPolicy
from ds_wsi.runtime.memory import ByteMeter
from ds_wsi.runtime.streams import show

_TRIED = ("native", *MODES)


@dataclass(frozen=True)
class ModeReport:
    """One mode.

    Args:
        mode: the mode's name.
        exact: whether it gave what the module gives alone; None where nothing could be said.
        reason: why it is refused, or why nothing could be said.
        bytes_per_tile: what a training step on the example allocates on the device at most, per tile (or image).
        seconds_per_tile: seconds that this step takes, per tile (or image).
    """

    mode: str
    exact: bool | None
    reason: str = ""
    bytes_per_tile: float = 0.0
    seconds_per_tile: float = 0.0


@dataclass(frozen=True)
class PartitionReport:
    """A module in every mode.

    Args:
        owner: the module's class.
        shape: the example's shape.
        modes: the modes' reports, in the order in which they were asked for.
    """

    owner: str
    shape: tuple[int, ...]
    modes: tuple[ModeReport, ...]

    @property
    def exact(self) -> tuple[str, ...]:
        """The modes that are exact."""
        return tuple(report.mode for report in self.modes if report.exact)

    def __str__(self) -> str:
        """A table, one line per mode."""
        rows = [("mode", "", "bytes per tile", "seconds per tile", "")]
        for report in self.modes:
            word = {True: "exact", False: "refused", None: "not checked"}[report.exact]
            costs = (
                (gib(report.bytes_per_tile), f"{report.seconds_per_tile:.3g}") if report.seconds_per_tile else ("", "")
            )
            rows.append((report.mode, word, *costs, report.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"partition of {self.owner} on {'x'.join(map(str, self.shape))}:", *lines])


def check_partition(
    module: nn.Module,
    example: Tensor,
    modes: Sequence[str] = _TRIED,
    *,
    axis: str = "batch",
    chunk_size: int | None = None,
) -> PartitionReport:
    """Try a module in modes of the partition, print what came out and return it; the module is as before afterwards.

    Args:
        module: not partitioned, in the mode (train or eval) that it will run in.
        example: tiles [N, ...], or images [B, C, H, W] on the spatial axis, 5 or more where there are as many.
        modes: "native" and those of `PartitionPolicy`, but for "auto" and "paper".
        axis: "batch" or "spatial".
        chunk_size: tiles, or rows, per chunk; the policy's default otherwise.

    Raises:
        ValueError: an unknown mode, no tiles, or a module that is partitioned.
    """
    unknown = [mode for mode in modes if mode not in _TRIED]
    if unknown:
        raise ValueError(f"modes must be among {', '.join(_TRIED)}, got {unknown[0]!r}")
    if not len(example):
        raise ValueError(f"example must hold tiles, got {list(example.shape)}")
    if isinstance(module.__dict__.get("forward"), PartitionedForward):
        raise ValueError(f"{type(module).__name__} must not be partitioned yet. HINT: handle.remove() first.")
    device = device_of(module, example.device)
    reports = tuple(_mode_report(module, example.to(device), mode, axis, chunk_size, device) for mode in modes)
    report = PartitionReport(type(module).__name__, tuple(example.shape), reports)
    show(report)
    return report


def _mode_report(
    module: nn.Module, example: Tensor, mode: str, axis: str, chunk_size: int | None, device: torch.device
) -> ModeReport:
    trained = any(parameter.requires_grad for parameter in module.parameters())
    if mode == "native":
        return ModeReport(mode, True, "", *_cost(module, module.forward, example, device))
    with Restored(module, device):  # a trace runs the module's Python
        try:
            refuse_devices(module, device)
            forward = PartitionedForward(module, PartitionPolicy(mode=mode, axis=axis, chunk_size=chunk_size))
            plan = forward.plan(example, device, example.dtype)
        except ValueError as error:
            return ModeReport(mode, False, str(error))
    save = trained or example.requires_grad
    case = Case(module, module.forward, forward.on_trial, plan, Arguments(), device, save, example.requires_grad)
    try:
        reason = check_case(case, sample_of(case, example, 8), len(example))
    except ValueError as error:
        return ModeReport(mode, False, str(error))
    if reason:
        return ModeReport(mode, None, reason)
    return ModeReport(mode, True, "", *_cost(module, forward.on_trial(plan), example, device))


def _cost(module: nn.Module, forward: Callable[..., Any], example: Tensor, device: torch.device) -> tuple[float, float]:
    """(Bytes, seconds) of a training step, per tile."""

    def step() -> None:
        outputs = [tensor for tensor in tensors_of(forward(example)) if tensor.requires_grad]
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if outputs and parameters:
            ones = [torch.ones_like(tensor) for tensor in outputs]
            torch.autograd.grad(outputs, parameters, ones, allow_unused=True)

    with Restored(module, device) as held:
        step()  # traces, and compiled kernels
        held.rewind()
        with ByteMeter() as meter:
            step()
        held.rewind()
        _wait(device)
        begun = time.perf_counter()
        step()
        _wait(device)
        return meter.peak / len(example), (time.perf_counter() - begun) / len(example)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
