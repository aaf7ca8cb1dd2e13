"""What the sub-modules of a module take and give while it runs, without a hook on any of them."""

import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as nn_module
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ds_wsi.partition.module.outputs import tensors_of
from ds_wsi.runtime.memory import host_allocation
from ds_wsi.runtime.seams import storage_key, writes_to_inputs

Seen = Callable[[str, str, list[Tensor]], None]  # a sub-module, the one that called it, tensors


class Calls:
    """Calls of sub-modules in this thread, as they begin and end.

    Hooks on the sub-modules themselves would change what the partition does with them; these are torch's global ones.

    Args:
        names: sub-module -> its name.
        root: the module itself, whose own call is not seen.
        enter, leave: called with what a sub-module takes, or gives.
    """

    def __init__(self, names: dict[nn.Module, str], root: nn.Module, enter: Seen | None, leave: Seen | None) -> None:
        self.names, self.root, self.enter, self.leave = names, root, enter, leave
        self.stack: list[str] = []
        self.looking = False  # what runs is `leave`, not the module
        self._thread = threading.get_ident()

    def __enter__(self) -> "Calls":
        self._handles = (
            nn_module.register_module_forward_pre_hook(self._entered),
            nn_module.register_module_forward_hook(self._left),
        )
        return self

    def __exit__(self, *exc: Any) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def innermost(self) -> str:
        """The name of the sub-module that runs."""
        return self.stack[-1] if self.stack else ""

    def _mine(self, module: nn.Module) -> bool:
        return module in self.names and module is not self.root and threading.get_ident() == self._thread

    def _entered(self, module: nn.Module, inputs: Any) -> None:
        if not self._mine(module):
            return
        tensors = real_tensors(inputs)
        if self.enter is not None and tensors is not None:
            self.enter(self.names[module], self.innermost, tensors)
        self.stack.append(self.names[module])

    def _left(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self._mine(module):
            return
        name = self.names[module]
        if name in self.stack:  # a call that raised has not left
            del self.stack[len(self.stack) - 1 - self.stack[::-1].index(name) :]
        tensors = real_tensors(output)
        if self.leave is not None and tensors is not None:
            self.looking = True
            self.leave(name, self.innermost, tensors)
            self.looking = False


@dataclass
class Recorded:
    """What sub-modules gave in one run, in the order in which their calls ended.

    Attributes:
        given: (name, tensors), in host memory.
        by_name: name -> the indices of its records in `given`.
        largest: the largest of all values, see `size`.
    """

    given: list[tuple[str, list[Tensor]]] = field(default_factory=list)
    by_name: dict[str, list[int]] = field(default_factory=dict)
    largest: float = 0.0
    _last: tuple[list[Any], list[Tensor], list[Tensor]] | None = None

    def add(self, name: str, caller: str, tensors: list[Tensor]) -> None:
        """Keep copies; what a container only hands on is kept once."""
        key = [(id(tensor), version_of(tensor)) for tensor in tensors]
        if self._last is None or self._last[0] != key:
            copies = [copied(tensor) for tensor in tensors]
            self._last = key, copies, tensors  # these are alive, or an id would come again
            self.largest = max(self.largest, *map(size, copies))
        self.by_name.setdefault(name, []).append(len(self.given))
        self.given.append((name, self._last[1]))

    def forget(self) -> None:
        """The run is over: keep the copies alone."""
        self._last = None


class Operations(TorchDispatchMode):
    """Sees operations that draw from a generator of their own, and how coarse the numbers are that are computed.

    Args:
        calls: the calls, which tell the sub-module that runs.
        draws: called with the generator and the sub-module's name, before it draws.
        writes: called with a tensor before it is written.

    Attributes:
        coarsest: the largest eps of what an operation gave; a module may compute in float32 what it gets in float64.
    """

    def __init__(
        self, calls: Calls, draws: Callable[[torch.Generator, str], None], writes: Callable[[Tensor], None]
    ) -> None:
        super().__init__()
        self.calls, self.draws, self.writes, self.coarsest = calls, draws, writes, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is not None:
            self.draws(generator, self.calls.innermost)
        if writes_to_inputs(func):
            for index, argument in enumerate(func._schema.arguments):
                item = args[index] if index < len(args) else kwargs.get(argument.name)
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(item, Tensor):
                    self.writes(item)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.coarsest = max(self.coarsest, torch.finfo(result.dtype).eps)
        return result


class Reads(TorchDispatchMode):
    """Sees which numbers Python reads of the tiles' values, and gives it others.

    Args:
        calls: the calls, which tell the sub-module that runs.
        wrong: number of a read -> what it gives.

    Attributes:
        seen: (sub-module, value) of each read.
    """

    def __init__(self, calls: Calls, wrong: dict[int, Any]) -> None:
        super().__init__()
        self.calls, self.wrong = calls, wrong
        self.seen: list[tuple[str, Any]] = []
        self._known: dict[int, StorageWeakRef] = {}  # memories that depend on the tiles

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [item for item in pytree.tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
        if self.calls.looking or not any(map(self._depends, given)):
            return result
        if isinstance(result, (bool, int, float)):
            number = len(self.seen)
            self.seen.append((self.calls.innermost, result))
            return self.wrong.get(number, result)
        written = given if writes_to_inputs(func) else []
        for item in (*written, *pytree.tree_leaves(result)):
            if isinstance(item, Tensor):
                self.mark(item)
        return result

    def mark(self, tensor: Tensor) -> None:
        """These are the tiles, or a tensor that depends on them."""
        if tensor.layout is torch.strided:
            self._known[storage_key(tensor)] = StorageWeakRef(tensor.untyped_storage())

    def _depends(self, tensor: Tensor) -> bool:
        memory = self._known.get(storage_key(tensor)) if tensor.layout is torch.strided else None
        return memory is not None and not memory.expired()


class SameDraws(TorchDispatchMode):
    """Every random operation draws the same numbers for the same shapes, in whatever order they come."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            shapes = [tuple(item.shape) if isinstance(item, Tensor) else item for item in args]
            torch.manual_seed(zlib.crc32(repr((str(func), shapes)).encode()))
        return func(*args, **kwargs)


def real_tensors(value: Any) -> list[Tensor] | None:
    """The tensors of a value; None where a trace runs the module on others than real ones."""
    tensors = tensors_of(value)
    if any(isinstance(tensor, FakeTensor) or tensor.is_meta or not type(tensor).__module__ for tensor in tensors):
        return None
    return tensors or None


def copied(tensor: Tensor) -> Tensor:
    """A copy in host memory: the device has a budget."""
    tensor = tensor if tensor.layout is torch.strided else tensor.to_dense()
    with host_allocation():
        return tensor.detach().to("cpu", copy=True)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 where nobody counts."""
    return 0 if tensor.is_inference() else tensor._version


def size(tensor: Tensor) -> float:
    """The largest finite value."""
    if not tensor.numel():
        return 0.0
    finite = tensor.abs().double().nan_to_num(0.0, 0.0, 0.0)
    return float(finite.max().item())
