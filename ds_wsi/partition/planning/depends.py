"""What a plan depends on, as one key that another process finds again: all that a search reads, but for the budgets.

A module is described by its parts, their classes and what they hold. What its parts compute is the packages' code, by
version and by the files of the classes. A module of other code has no key, because nobody says what that code reads.
"""

import functools
import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import ds_wsi
from ds_wsi.norms.roles import is_shared
from ds_wsi.partition.execution.input_tensor import InputCost
from ds_wsi.partition.module.arguments import Arguments
from ds_wsi.partition.module.hooks import is_compiled, weight_hooks
from ds_wsi.partition.planning.rates import Rates
from ds_wsi.partition.planning.simulate import OF_ENGINES
from ds_wsi.partition.policy import PartitionPolicy
from ds_wsi.runtime.seams import whole_shape

FORMAT = 1  # of the key and of what is kept under it
PACKAGES = ("torch", "timm", "torchvision", "transformers", "ds_wsi")  # whose code is known by version and file
_LIBRARIES = (*PACKAGES[:-1], "numpy")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format)
_BUDGETS = ("gpu_budget_bytes", "host_budget_bytes", "check", "keep_plans")  # of a policy: what a search does not read


class NoKeyError(Exception):
    """What a plan would depend on cannot be told; says why."""


@dataclass(frozen=True)
class Asked:
    """All that a search for a plan is given, but for the budgets: see `plan_partition`."""

    module: nn.Module
    shape: tuple[int, ...]
    policy: PartitionPolicy
    dtype: torch.dtype
    autocast: torch.dtype | None
    device: torch.device
    rates: Rates
    source: InputCost | None
    arguments: Arguments | None


def key_of(asked: Asked) -> str:
    """The SHA-256 of what a plan depends on, hexadecimal.

    Raises:
        NoKeyError: it cannot be told.
    """
    if asked.arguments is not None and (asked.arguments.args or asked.arguments.kwargs):
        raise NoKeyError("arguments beside the tiles")
    if asked.policy.nvme_path:
        raise NoKeyError("a disk, of which more or less is free")
    described = _Described()
    policy = {name: value for name, value in asdict(asked.policy).items() if name not in _BUDGETS}
    what = {
        "format": FORMAT,
        "module": [described.of(asked.module), is_shared(asked.module)],
        "classes": described.classes,
        "files": {name: _file_hash(name) for name in sorted(described.files)},
        "shape": list(asked.shape),
        "policy": {name: repr(value) for name, value in policy.items()},
        "given": [str(asked.dtype), str(asked.autocast), str(asked.device), asked.arguments and asked.arguments.name],
        "rates": repr(asked.rates),
        "source": repr(asked.source),
        "code": _own_code(),
        "versions": [platform.python_version(), platform.machine(), *map(_version, _LIBRARIES)],
        "switches": _switches(asked.device),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


class _Described:
    """A module as JSON that is equal for modules of which a search says the same.

    Attributes:
        files: the files whose code the module runs.
        classes: the functions and plain values that each class of a part has now; code can put others there.
    """

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.classes: dict[str, Any] = {}
        self._seen: dict[int, int] = {}  # id -> number, of what may be held twice
        self._held: list[Any] = []  # so that no id is used again

    def of(self, value: Any) -> Any:
        """A description of a value.

        Raises:
            NoKeyError: there is none.
        """
        if type(value) in _PLAIN:
            return [type(value).__name__, repr(value)]
        if isinstance(value, torch.Size) or type(value) in (list, tuple):
            return [type(value).__name__, *map(self.of, value)]
        if isinstance(value, Mapping) and type(value).__module__ in ("builtins", "collections"):
            return [type(value).__name__, *([self.of(key), self.of(item)] for key, item in value.items())]
        if type(value) in (set, frozenset):
            return [type(value).__name__, *sorted(map(json.dumps, map(self.of, value)))]
        if isinstance(value, Enum):
            return [self._code(type(value)), value.name]
        if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
            return self._code(value)
        return self._object(value)

    def _object(self, value: Any) -> Any:
        """A tensor, a part or another object: by its number where it was met before."""
        if id(value) in self._seen:
            return ["again", self._seen[id(value)]]
        first = not self._seen
        self._seen[id(value)] = len(self._seen)
        self._held.append(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, functools.partial):
            return ["partial", self.of(value.func), self.of(value.args), self.of(value.keywords)]
        if not hasattr(value, "__dict__") or not _is_known(type(value)):
            raise NoKeyError(f"a {type(value).__name__} of {type(value).__module__}")
        held = _state(value, first=first) if isinstance(value, nn.Module) else vars(value)
        return [self._code(type(value)), *([name, self.of(item)] for name, item in held.items())]

    def _tensor(self, value: Tensor) -> Any:
        if value.layout is not torch.strided:
            raise NoKeyError(f"a tensor of layout {value.layout}")
        kind = type(value).__name__, str(value.dtype), value.requires_grad, value.device.type
        return ["tensor", *kind, list(whole_shape(value)), list(value.stride())]

    def _code(self, value: Any) -> Any:
        """A class or a function, by its name and its file; a method with whose it is."""
        for one in value.__mro__ if isinstance(value, type) else (value,):
            module = getattr(one, "__module__", None) or "builtins"
            if module == "builtins":
                continue
            if not _is_known(one) or "<" in getattr(one, "__qualname__", "<"):
                raise NoKeyError(f"code of {module}, {getattr(one, '__qualname__', one)}")
            file = getattr(sys.modules.get(module), "__file__", None)
            if file is not None:
                self.files.add(file)
            name = f"{module}.{one.__qualname__}"
            if isinstance(one, type) and name not in self.classes:
                self.classes[name] = sorted(map(repr, _members(one)))
        owner = getattr(value, "__self__", None)
        bound = None if owner is None or isinstance(owner, ModuleType) else self.of(owner)
        return ["code", getattr(value, "__module__", None), value.__qualname__, _code_hash(value), bound]


def _state(part: nn.Module, *, first: bool) -> dict[str, Any]:
    """What a search takes of a part: see `Simulator`'s copy of a module."""
    if is_compiled(part):
        raise NoKeyError("what torch.compile has made of a part")
    if type(part).__mro__[1].__name__ == "FSDPModule":
        raise NoKeyError("parameters that FSDP2 shards")
    state = {name: held for name, held in part.__dict__.items() if not OF_ENGINES.search(name)}
    if first:
        state.pop("forward", None)  # a partition's own
    return {**state, "_forward_pre_hooks": weight_hooks(part)}


def _members(kind: type) -> list[tuple[str, ...]]:
    """Functions and plain values of a class, as they are now.

    Raises:
        NoKeyError: a function is other code's.
    """
    members: list[tuple[str, ...]] = []
    for name, held in list(vars(kind).items()):
        function = getattr(held, "__func__", getattr(held, "fget", held))
        if hasattr(function, "__code__"):
            if not _is_known(function):
                raise NoKeyError(f"{kind.__name__}.{name}, which {function.__module__} has put there")
            members.append((name, _code_hash(function)))
        elif type(held) in _PLAIN and not name.startswith("__"):
            members.append((name, repr(held)))
    return members


def _code_hash(function: Any) -> str:
    """A function's own bytes: code may have put another one of this name there."""
    code = getattr(function, "__code__", None)
    return "" if code is None else hashlib.sha256(code.co_code + repr(code.co_names).encode()).hexdigest()


def _is_known(value: Any) -> bool:
    """Whether a class or function is of `PACKAGES`, or Python's own."""
    package = (getattr(value, "__module__", None) or "builtins").partition(".")[0]
    return package in PACKAGES or (package in sys.stdlib_module_names and package != "__main__")


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} none"


@functools.cache
def _file_hash(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise NoKeyError(f"{path}: {error}") from error


@functools.cache
def _own_code() -> str:
    """The planner's own code, and all that it calls here: every file of the package."""
    digest = hashlib.sha256()
    root = Path(ds_wsi.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0{_file_hash(str(path))}\n".encode())
    return digest.hexdigest()


def _switches(device: torch.device) -> list[str]:
    """What torch's and timm's kernels are chosen by, of this process and of this machine."""
    cuda = torch.backends.cuda
    sdp = [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()]
    sdp.append(cuda.cudnn_sdp_enabled())
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    switches = [
        *(torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()),
        *(
            torch.is_inference_mode_enabled(),
            torch.cuda.is_available(),
            *sdp,
            torch.backends.mha.get_fastpath_enabled(),
        ),
        *(cudnn.enabled, cudnn.benchmark, cudnn.deterministic, mkldnn.is_available(), torch.version.cuda),
        torch.backends.cpu.get_cpu_capability(),
    ]
    if device.type == "cuda" and torch.cuda.is_available():
        switches += [torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)]
    timm = sys.modules.get("timm.layers.config")
    switches += sorted(
        f"{name}={held}" for name, held in vars(timm or object).items() if type(held) in (bool, int, str)
    )
    return list(map(str, switches))
