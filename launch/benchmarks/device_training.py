"""Training steps of a ResNet-18 under a cap of memory: on a GPU, or with counted bytes on a CPU."""

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_wsi.partition import Handle, PartitionPlan, PartitionPolicy, partition_layers, plan_partition
from ds_wsi.partition.planning.rates import Rates, device_key
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.memory import ByteMeter, DevicePeaks, device_peaks, restart_peaks

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class DoesNotFitError(Exception):
    """A training step that needs more memory than there is, and why."""


@dataclass(frozen=True)
class Machine:
    """Time, memory and caps of a GPU, or of a CPU in its place.

    Args:
        device: where it runs.
        dtype: autocast's dtype; float32 for none.
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
        restart_peaks(self.device)
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
        machine: the machine it runs on.
        model: everything that is trained.
        forward: the logits [1, classes], by `model`.
        handle: the partition's handle, if there is one.
        plan: the partition's plan, if it was planned.

    Attributes:
        peaks: what the GPU held at most in the last step.
        peak_bytes: the peak of all steps so far; on a GPU active bytes, which no other tensor could have had.
        loss: the last step's loss.
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
            DoesNotFitError: it ran out of memory, or failed (kernels that cannot index so large a tensor, say).
        """
        seconds, self.peaks = self._guarded(lambda: self.machine.timed(self._train))
        self.peak_bytes = max(self.peak_bytes, self.peaks.active)
        return seconds

    def count(self, cap_bytes: int, *, refuse: bool = True) -> None:
        """Count the bytes of a forward and backward on a CPU; on a GPU the steps themselves are watched.

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
        machine: the machine to run on.
        mode: one of `MODES`.
        image: [1, 3, side, side]; on the host too for "planner".
        budget: bytes for activations and gradients; of mode "paper", eight times the largest map on the device.
        chunk: rows per chunk, for the planner; None lets it search.
        prepare: what prepares the image, whole or a chunk of it.
        rates: the machine's rates.
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
