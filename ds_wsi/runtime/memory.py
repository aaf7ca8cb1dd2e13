"""Memory of this process: its peak, its share of what is free, and a meter of the tensor bytes that are alive."""

import re
import resource
import shutil
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from ds_wsi.runtime.environment import ranks_on_machine
from ds_wsi.runtime.seams import (
    TorchDispatchMode,
    check_seams,
    operation_of,
    storage_key,
    tree_leaves,
    writes_to_inputs,
)

_KINDS = ("allocated", "active", "reserved")  # as torch.cuda.memory_stats names them
# Of the driver, of cuBLAS, and of cuDNN and others.
_NO_MEMORY = re.compile(r"out of memory|ALLOC(ATION)?_FAILED", re.IGNORECASE)


@dataclass(frozen=True)
class DevicePeaks:
    """The most that a GPU held since the peaks were reset.

    Attributes:
        allocated: bytes of tensors.
        active: bytes that no other tensor could have had: of tensors, and of what a copy on another stream still uses.
        reserved: bytes that the device lost to this process's allocator, its cache included.
        retries: how often the allocator had to give its cache back to go on.
    """

    allocated: int = 0
    active: int = 0
    reserved: int = 0
    retries: int = 0

    def __str__(self) -> str:
        """The numbers in GiB."""
        sizes = f"allocated {self.allocated / 2**30:.2f} GiB, active {self.active / 2**30:.2f} GiB"
        return f"{sizes}, reserved {self.reserved / 2**30:.2f} GiB, {self.retries} allocation retries"


def device_peaks(device: torch.device) -> DevicePeaks:
    """See `DevicePeaks`; zeros on a CPU."""
    if device.type != "cuda":
        return DevicePeaks()
    stats = torch.cuda.memory_stats(device)
    allocated, active, reserved = (int(stats.get(f"{kind}_bytes.all.peak", 0)) for kind in _KINDS)
    return DevicePeaks(allocated, active, reserved, int(stats.get("num_alloc_retries", 0)))


def restart_peaks(device: torch.device) -> None:
    """Let `device_peaks` count from here; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.reset_accumulated_memory_stats(device)  # the retries are no peak


def says_no_memory(error: BaseException) -> bool:
    """Whether a GPU's memory is full: cuBLAS and cuDNN say so in a RuntimeError, with words of their own."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: what a GPU lost to this process, the resident set on a CPU."""
    if device.type == "cuda":
        return device_peaks(device).reserved
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


_host_depth = 0


@contextmanager
def host_allocation() -> Iterator[None]:
    """Tensors made inside stand for host memory: a `ByteMeter` books them apart, where the device is the CPU too."""
    global _host_depth
    _host_depth += 1
    try:
        yield
    finally:
        _host_depth -= 1


def books_host() -> bool:
    """Whether `host_allocation` is on."""
    return _host_depth > 0


class ByteMeter(TorchDispatchMode):
    """Counts, inside its context, the bytes of tensor storage that operations allocate and that are still alive.

    Works on a CPU, on a GPU and on fake tensors, where it predicts. Storages that existed before are not counted, nor
    is what a kernel allocates and frees within one operation (cuDNN's workspace).

    Attributes:
        live, peak: bytes on the device, now and at most since `restart_peak`.
        host_live, host_peak: the same of what was made under `host_allocation`.
        copied: bytes copied to or from host memory.
        operations: how many there were.
        flops: multiply-adds counted twice, of convolutions, matrix products and attention.
        touched: bytes that operations read and wrote.
    """

    def __init__(self) -> None:
        check_seams("torch", "meter")
        super().__init__()
        self.live = self.peak = self.host_live = self.host_peak = 0
        self.copied = self.flops = self.touched = self.operations = 0
        self._known: dict[int, tuple[int, bool, weakref.ref]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.counted(func, args, kwargs or {})

    def counted(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation's results, with what it does counted."""
        out = func(*args, **kwargs)
        if func is torch.ops.prim.device.default:  # asked of fake tensors alone: nothing is computed
            return out
        self.operations += 1
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = {storage_key(leaf) for leaf in inputs}
        for leaf in outputs:
            if storage_key(leaf) not in given:  # else a view, or in place
                self.book(leaf)
        packet = operation_of(func)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif "_scaled_dot_product" in str(packet) and len(inputs) >= 3:
            # Kernels that the registry lacks (the CPU's): two products forward, five backward.
            products = 5 if "backward" in str(packet) else 2
            query, key, value = inputs[-3:] if products == 2 else inputs[1:4]
            self.flops += 2 * products * query.numel() * key.shape[-2]
            del value
        if any(storage_key(leaf) not in given for leaf in outputs) or writes_to_inputs(func):
            size = sum(leaf.numel() * leaf.element_size() for leaf in (*inputs, *outputs))
            if _host_depth:
                self.copied += size // 2
            else:
                self.touched += size
        return out

    def restart_peak(self) -> int:
        """Return the peak since the last call and start anew from what is alive."""
        peak, self.peak = self.peak, self.live
        return peak

    def book(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now until it is freed; once."""
        storage = tensor.untyped_storage()
        key = storage_key(tensor)
        if key in self._known:
            return
        size, host = storage.nbytes(), _host_depth > 0
        self._known[key] = (size, host, weakref.ref(storage, lambda _: self._forget(key)))
        if host:
            self.host_live += size
            self.host_peak = max(self.host_peak, self.host_live)
        else:
            self.live += size
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        size, host, _ = self._known.pop(key)
        if host:
            self.host_live -= size
        else:
            self.live -= size


def free_bytes(device: torch.device) -> int:
    """What this process may still take on a device, torch's unused cache included; of a CPU `free_host_bytes`."""
    if device.type != "cuda":
        return free_host_bytes()
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached


def free_host_bytes() -> int:
    """This rank's share of half of what is free: of the machine's memory and of its control group's.

    The ranks of a machine share it evenly, because each of them plans by itself.
    """
    free = psutil.virtual_memory().available
    for limit_name, used_name in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            with open(limit_name, encoding="ascii") as limit, open(used_name, encoding="ascii") as used:
                text = limit.read().strip()
                if text != "max":
                    free = min(free, int(text) - int(used.read()))
        except (OSError, ValueError):
            continue
    return max(0, free // 2 // ranks_on_machine())


def free_disk_bytes(directory: str | Path) -> int:
    """This rank's share of half of what is free on a local disk, which all ranks of the machine write to."""
    return shutil.disk_usage(directory).free // 2 // ranks_on_machine()
