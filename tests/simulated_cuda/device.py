"""Operations on the simulated device, each by the CPU's kernel on the same memory.

Only inside a process with the environment of `lane.py`: torch's CUDA calls go to cuda_runtime.cpp there. Allocation,
views, copies between device and host, streams and events are torch's own; a dispatch mode takes over everything else.
"""

import atexit
import ctypes
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .kernels import EMULATED, drawing_from, host_generator

_COUNTERS = (
    "device_bytes",
    "device_peak",
    "locked_bytes",
    "locked_peak",
    "pending_bytes",
    "kernels",
    "mallocs",
    "frees",
    "syncs",
)
# What torch does by itself: it runs no kernel.
_UNCHANGED = {
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "is_pinned",
    "_pin_memory",
    "record_stream",
    "resize_",
    "set_",
}
# What torch itself gives operands of several devices.
_MIXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
_WAITING = {"_local_scalar_dense", "equal", "nonzero"}  # the host reads their result
_CPU = torch.device("cpu")


def _library() -> ctypes.CDLL:
    runtime = ctypes.CDLL(None)
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name, result, arguments in (
        ("cudaGetLastError", ctypes.c_int, []),
        ("simulated_begin_kernel", None, [pointer]),
        ("simulated_operand", pointer, [pointer, pointer, size]),
        ("simulated_write", None, [pointer, pointer, pointer, size]),
        ("simulated_fail_mallocs", None, [size]),
        ("simulated_counter", size, [ctypes.c_char_p]),
        ("simulated_reset_counters", None, []),
    ):
        function = getattr(runtime, name)
        function.restype, function.argtypes = result, arguments
    return runtime


_runtime = _library()


def counters() -> dict[str, int]:
    """What the runtime has counted: bytes now and at most, copies that wait, kernels launched, calls."""
    return {name: _runtime.simulated_counter(name.encode()) for name in _COUNTERS}


def reset_counters() -> None:
    """Start counting anew; peaks from what is held."""
    _runtime.simulated_reset_counters()


def fail_mallocs(count: int) -> None:
    """Let the next `count` calls of cudaMalloc fail; torch tries three times before it raises."""
    _runtime.simulated_fail_mallocs(count)


class SimulatedDevice(TorchDispatchMode):
    """Runs what touches device memory; refuses operands of several devices, as the GPU's kernels do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
        planning = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        if planning or any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)  # nothing is computed; user modes are asked before the fake one
        if any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors):
            return NotImplemented  # the subclass's own dispatch, whose operations on plain tensors come here
        devices = [tensor.device for tensor in tensors if tensor.is_cuda]
        devices += [leaf for leaf in flat if isinstance(leaf, torch.device) and leaf.type == "cuda"]
        name = func._overloadpacket.__name__
        if not devices or name in _UNCHANGED:
            return func(*args, **kwargs)
        parts = _made_of_others(func, name)
        if parts is not None:
            with self:
                return func._op_dk(parts, *args, **kwargs)
        if func.is_view:
            return func(*args, **kwargs)
        if name == "copy_" and args[0].device != args[1].device:
            return self._copy_between(func, *args, **kwargs)
        _refuse_several_devices(name, tensors)
        index = torch.cuda.current_device() if devices[0].index is None else devices[0].index
        return _Kernel(torch.device("cuda", index)).run(func, name, flat, spec)

    def _copy_between(self, func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Copy from device to device: bytes, after what torch does to make it such a copy.

        Source: aten/src/ATen/native/cuda/Copy.cu, copy_requires_temporaries and what follows it.
        """
        same = target.dtype == source.dtype and target.shape == source.shape
        if same and _steps(target) == _steps(source) and _is_dense(target):
            return func(target, source, non_blocking)
        with self:
            staged = source.to(target.dtype).expand_as(target).contiguous()
            if target.is_contiguous():
                return target.copy_(staged, non_blocking)
            return target.copy_(torch.empty_like(staged, device=target.device).copy_(staged, non_blocking))


def _made_of_others(func: Any, name: str) -> Any:
    """The dispatch key of an operation that is made of others, which come here one by one; None of the others."""
    keys = torch._C.DispatchKey
    if name == "_to_copy":  # allocates, and copies between devices
        return keys.CompositeExplicitAutograd
    # Autograd has taken these apart already, but not in inference mode.
    made = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), keys.CompositeImplicitAutograd)
    return keys.CompositeImplicitAutograd if made else None


def _refuse_several_devices(name: str, tensors: list[Tensor]) -> None:
    """Raise as torch's kernels do; numbers on the CPU are fine, and lists are taken apart where they are mixed."""
    devices = {str(tensor.device) for tensor in tensors if tensor.is_cuda or tensor.dim() > 0}
    if len(devices) > 1 and name not in _MIXED and not name.startswith("_foreach_"):
        shapes = ", ".join(f"{tensor.device} {list(tensor.shape)}" for tensor in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} got {shapes}")


def _steps(tensor: Tensor) -> list[int]:
    """The strides that are ever stepped along: those of dimensions of one element may be anything."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or repeats, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


class _Kernel:
    """One operation of the current stream.

    Args:
        device: where its results lie.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch._C._cuda_getCurrentRawStream(device.index)
        self.lowered: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of the device's: it, and the CPU's

    def run(self, func: Any, name: str, flat: list[Any], spec: Any) -> Any:
        if name in _WAITING:
            torch.cuda.current_stream(self.device).synchronize()
        _runtime.simulated_begin_kernel(self.stream)
        for leaf in flat:
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                self._place(leaf.untyped_storage())  # what one makes happen may move another: places are asked for anew
        explicit = any(isinstance(leaf, torch.Generator) for leaf in flat)
        args, kwargs = tree_unflatten([self._lower(leaf) for leaf in flat], spec)
        compute: Callable[..., Any] = EMULATED.get(name, func)
        if torch.Tag.nondeterministic_seeded in func.tags and not explicit:
            with drawing_from(torch.cuda.default_generators[self.device.index]):
                results = compute(*args, **kwargs)
        else:
            results = compute(*args, **kwargs)
        # As after every launch: an error of an earlier call that nobody has read is raised here.
        torch.cuda.check_error(_runtime.cudaGetLastError())
        leaves, form = tree_flatten(results)
        return tree_unflatten([self._raise(leaf) for leaf in leaves], form)

    # ------------------------------------------------------------------------------------------------ operands

    def _lower(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_cuda:
            if id(value) not in self.lowered:
                self.lowered[id(value)] = value, self._on_cpu(value)
            return self.lowered[id(value)][1]
        if isinstance(value, torch.device) and value.type == "cuda":
            return _CPU
        if isinstance(value, torch.Generator) and value.device.type == "cuda":
            return host_generator(value)
        return value

    def _place(self, storage: torch.UntypedStorage) -> int:
        """Where its bytes are: in device memory, or in a write which waits in the stream."""
        return _runtime.simulated_operand(self.stream, storage.data_ptr(), storage.nbytes())

    def _on_cpu(self, tensor: Tensor) -> Tensor:
        """A CPU tensor over the same bytes."""
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        memory = torch._C._construct_storage_from_data_pointer(self._place(storage), _CPU, storage.nbytes())
        bare = torch.empty(0, dtype=tensor.dtype)
        return bare.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())

    # ------------------------------------------------------------------------------------------------- results

    def _raise(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device != _CPU:
            return value
        for on_device, on_cpu in self.lowered.values():
            if value is on_cpu:
                return on_device
        if value.numel():
            memory = value.untyped_storage().data_ptr()
            for on_device, on_cpu in self.lowered.values():
                if on_cpu.numel() and on_cpu.untyped_storage().data_ptr() == memory:
                    return torch.as_strided(on_device, value.shape, value.stride(), value.storage_offset())
        return self._written(value)

    def _written(self, value: Tensor) -> Tensor:
        """The result in device memory of its own, or on its way there."""
        if not _is_dense(value):
            value = value.contiguous()
        result = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=self.device)
        if size := value.numel() * value.element_size():
            _runtime.simulated_write(self.stream, result.data_ptr(), value.data_ptr(), size)
        return result


def enter() -> SimulatedDevice:
    """Simulate the device from here to the end of the process, on all threads that autograd uses.

    cuDNN and the fused attention kernels would be called by names of their own, and are switched off.
    """
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Autograd's threads may be freeing a graph, and would be ended in the middle of it: the process would abort.
    atexit.register(time.sleep, 0.1)
    mode = SimulatedDevice()
    mode.__enter__()
    return mode
