"""Memory of this process: its peak, and a meter of the tensor bytes that are alive."""

import resource
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: the allocator's on a GPU, the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
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
        super().__init__()
        self.live = self.peak = self.host_live = self.host_peak = 0
        self.copied = self.flops = self.touched = self.operations = 0
        self._known: dict[int, tuple[int, bool]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.operations += 1
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = {leaf.untyped_storage()._cdata for leaf in inputs}
        for leaf in outputs:
            if leaf.untyped_storage()._cdata not in given:  # else a view, or in place
                self._book(leaf)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif "_scaled_dot_product" in str(packet) and len(inputs) >= 3:
            # Kernels that the registry lacks (the CPU's): two products forward, five backward.
            products = 5 if "backward" in str(packet) else 2
            query, key, value = inputs[-3:] if products == 2 else inputs[1:4]
            self.flops += 2 * products * query.numel() * key.shape[-2]
            del value
        if any(leaf.untyped_storage()._cdata not in given for leaf in outputs) or func._schema.is_mutable:
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

    def _book(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size, host = storage.nbytes(), _host_depth > 0
        self._known[key] = (size, host)
        weakref.finalize(storage, self._forget, key)
        if host:
            self.host_live += size
            self.host_peak = max(self.host_peak, self.host_live)
        else:
            self.live += size
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        size, host = self._known.pop(key)
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
    """Half of what this process may still take: of the machine's memory and of its control group's."""
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
    return max(0, free // 2)
