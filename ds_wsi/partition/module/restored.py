"""A module as it is for a trial: its parameters, buffers, attributes and random state are stand-ins until it ends."""

import pickle
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ds_wsi.norms.population import TORCH_NORMS, after_norm, forward_home
from ds_wsi.norms.roles import GROUP, STEP_GROUP
from ds_wsi.partition.module.holdings import (
    HOOKS,
    attributes_of,
    containers_of,
    hidden_modules,
    refill,
    tensors_of_part,
)
from ds_wsi.runtime.seams import storage_key


class LocalNorm(_BatchNorm):
    """A SyncBatchNorm for the time of a trial: this rank's tiles alone, no collective."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class LocalNormAct(LocalNorm):
    """The same of timm's SyncBatchNormAct."""

    def forward(self, input: Tensor) -> Tensor:
        """What BatchNorm gives, and what timm's own adds."""
        return after_norm(self, super().forward(input))


@dataclass(frozen=True)
class Generator:
    """A source of random numbers.

    Args:
        name: what errors call it; "" for torch's default generators.
        read, write: the getter and the setter of its state.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]


class Restored:
    """A module between `__enter__` and `__exit__`, where nothing that is done to it lasts.

    Parameters are new ones on the same memory: their hooks do not fire, their `grad` stays. Hooks of modules are silent
    but for torch's own that compute weights. Buffers and tensors that are attributes are copies. SyncBatchNorm is a
    BatchNorm without a process group.

    Args:
        module: the module, with all its parts.
        device: the device that computes.
        dtype: the floating-point stand-ins' dtype; None for each one's own.
    """

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.module, self.device, self.dtype = module, device, dtype
        self.names = {part: name for name, part in module.named_modules()}
        self.generators = [*default_generators(device), *own_generators(module)]
        self._saved: list[tuple[nn.Module, type, dict[str, Any]]] = []
        self._base: dict[nn.Module, dict[str, Any]] = {}
        self._containers: list[tuple[Any, Any]] = []
        self._values: dict[int, tuple[Any, Tensor]] = {}  # id of a stand-in -> the stand-in, its memory

    def __enter__(self) -> "Restored":
        self._states = [generator.read() for generator in self.generators]
        self._saved = [(part, type(part), dict(part.__dict__)) for part in self.names]
        stand_ins: dict[int, Any] = {}
        for part, kind, held in self._saved:
            base = dict(held)
            base["_parameters"] = {name: self._parameter(item, stand_ins) for name, item in part._parameters.items()}
            for name in HOOKS:
                if name in base:
                    base[name] = OrderedDict((key, hook) for key, hook in base[name].items() if computes_weight(hook))
            base.pop(GROUP, None), base.pop(STEP_GROUP, None)
            self._base[part] = base
            self._containers += containers_of(part)
            if issubclass(kind, nn.SyncBatchNorm):
                part.__class__ = LocalNorm if forward_home(kind) == TORCH_NORMS else LocalNormAct
        self._values = {id(item): (item, item.detach()) for item in stand_ins.values()}
        self.rewind()
        return self

    def __exit__(self, *exc: Any) -> None:
        for part, kind, held in self._saved:
            part.__class__ = kind
            part.__dict__.clear()
            part.__dict__.update(held)
        self._refill()
        for generator, state in zip(self.generators, self._states, strict=True):
            generator.write(state)

    def rewind(self) -> None:
        """Everything as at the beginning, for the next run."""
        copies: dict[int, Tensor] = {}
        with torch.no_grad():
            self._refill(copies)
            for stand_in, value in self._values.values():
                if storage_key(stand_in) != storage_key(value):
                    stand_in.data = value
            for part, base in self._base.items():
                part.__dict__.clear()
                part.__dict__.update(base)
                for table in ("_parameters", "_modules"):
                    part.__dict__[table] = dict(base[table])
                buffers = base["_buffers"]
                part.__dict__["_buffers"] = {name: self._copy(item, copies) for name, item in buffers.items()}
                for name, item in base.items():
                    if _is_state(item):
                        part.__dict__[name] = self._copy(item, copies)
        for generator, state in zip(self.generators, self._states, strict=True):
            generator.write(state)

    def adopt(self, generator: torch.Generator, name: str) -> None:
        """Rewind and restore one more, seen as it is about to draw for the first time."""
        self.generators.append(Generator(name, generator.get_state, generator.set_state))
        self._states.append(generator.get_state())

    def moved(self) -> list[str]:
        """The names of the generators that are not where they were."""
        pairs = zip(self.generators, self._states, strict=True)
        return [generator.name for generator, state in pairs if mark(generator.read()) != mark(state)]

    def marks(self) -> list[bytes]:
        """Where all generators are."""
        return [mark(generator.read()) for generator in self.generators]

    def tensors(self) -> dict[str, Tensor]:
        """Buffers and tensors that are attributes, or in containers, by qualified name."""
        return {
            f"{name}.{path}" if name else path: tensor
            for part, name in self.names.items()
            for path, tensor in tensors_of_part(part)
        }

    def attributes(self) -> dict[tuple[str, str], Any]:
        """Plain values of every part, and in its containers, by (part, path)."""
        return {(name, path): value for part, name in self.names.items() for path, value in attributes_of(part)}

    def place_of(self, name: str) -> tuple[str, str]:
        """(The part, the place in it) of a qualified name."""
        owner = max((part for part in self.names.values() if name.startswith(f"{part}.")), key=len, default="")
        return owner, name[len(owner) + 1 :] if owner else name

    def parameters(self) -> dict[int, str]:
        """The names of the module's parameters, by the ids of the tensors and of their stand-ins."""
        names: dict[int, str] = {}
        for part, name in self.names.items():
            for held in (self._base[part]["_parameters"], self._original(part)["_parameters"]):
                for key, item in held.items():
                    if item is not None:
                        names.setdefault(id(item), f"{name}.{key}" if name else key)
        return names

    def replaced_parameter(self) -> str | None:
        """The name of a parameter in whose place there is another, or other memory, since `rewind`."""
        for part, name in self.names.items():
            for key, item in self._base[part]["_parameters"].items():
                if item is not None and (
                    part._parameters.get(key) is not item or storage_key(item) != storage_key(self._values[id(item)][1])
                ):
                    return f"{name}.{key}" if name else key
        return None

    def must_not_write(self, parameter: str) -> str:
        """The sentence that refuses a module which writes this parameter."""
        owner, key = self.place_of(parameter)
        return f"{self.who(owner)} must not write its parameter {key!r} in forward. HINT: keep it out of the partition."

    def who(self, name: str) -> str:
        """A part, for a sentence."""
        return f"{name!r} ({next(type(part).__name__ for part, part_name in self.names.items() if part_name == name)})"

    def holder_of(self, tensor: Tensor) -> tuple[str, str]:
        """(The part that holds a tensor which is no parameter of it, what the tensor is there), for a sentence."""
        for part, name in self.names.items():
            for path, item in tensors_of_part(part):
                if item is tensor:
                    return self.who(name), repr(path)
            for module in hidden_modules(part):
                for key, item in module.named_parameters():
                    if item is tensor:
                        return self.who(name), f"{key!r} of a {type(module).__name__} that is no sub-module of it,"
        return self.who(""), "a tensor"

    def memory(self) -> dict[int, str]:
        """The names of the parameters, by the storages of their stand-ins."""
        names = self.parameters()
        return {storage_key(value): names[key] for key, (_, value) in self._values.items() if value.numel()}

    def _original(self, part: nn.Module) -> dict[str, Any]:
        return next(held for saved, _, held in self._saved if saved is part)

    def _refill(self, copies: dict[int, Tensor] | None = None) -> None:
        for container, content in self._containers:
            items = content
            if copies is not None:
                items = _with(content, lambda item: self._copy(item, copies) if _is_state(item) else item)
            refill(container, items)

    def _parameter(self, parameter: Any, stand_ins: dict[int, Any]) -> Any:
        if parameter is None:
            return None
        if id(parameter) not in stand_ins:
            value = parameter.detach()
            if self.dtype is not None and value.is_floating_point():
                value = value.to(self.dtype)
            stand_ins[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        return stand_ins[id(parameter)]

    def _copy(self, tensor: Tensor | None, copies: dict[int, Tensor]) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in copies:
            wide = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
            copies[id(tensor)] = tensor.detach().to(wide, copy=True)
            if tensor.is_leaf and tensor.requires_grad:
                copies[id(tensor)].requires_grad_()
        return copies[id(tensor)]


def _is_state(item: Any) -> bool:
    """Whether it is a tensor that a module keeps, not one of a graph."""
    return type(item) is Tensor and item.grad_fn is None


def _with(content: Any, change: Callable[[Any], Any]) -> Any:
    """A container's content with its items changed."""
    if isinstance(content, dict):
        changed = content.copy()
        for key, item in content.items():
            changed[key] = change(item)
        return changed
    return content if isinstance(content, set) else type(content)(map(change, content))


def default_generators(device: torch.device) -> list[Generator]:
    """Torch's, which the partition replays, and numpy's and Python's."""
    generators = [Generator("", torch.get_rng_state, torch.set_rng_state)]
    if device.type == "cuda":
        generators.append(
            Generator(
                "", lambda: torch.cuda.get_rng_state(device), lambda state: torch.cuda.set_rng_state(state, device)
            )
        )
    return [*generators, *foreign_generators()]


def foreign_generators() -> list[Generator]:
    """Numpy's and Python's."""
    return [
        Generator("numpy.random", np.random.get_state, np.random.set_state),
        Generator("random", random.getstate, random.setstate),
    ]


def own_generators(module: nn.Module) -> Iterator[Generator]:
    """Those that are attributes of a module's parts, also in lists, tuples and dicts."""
    seen: set[int] = set()
    for name, part in module.named_modules():
        for key, value in part.__dict__.items():
            items = value if type(value) in (list, tuple) else value.values() if type(value) is dict else (value,)
            for item in items:
                generator = _generator(item, f"{name}.{key}" if name else key)
                if generator is not None and id(item) not in seen:
                    seen.add(id(item))
                    yield generator


def mark(state: Any) -> bytes:
    """A generator's state, to compare."""
    return bytes(state.numpy().tobytes()) if isinstance(state, Tensor) else pickle.dumps(state)


def computes_weight(hook: Any) -> bool:
    """Whether a hook is torch's own weight norm, spectral norm or pruning: a part of the forward, not a user's."""
    return type(hook).__module__.startswith("torch.nn.utils")


def _generator(item: Any, name: str) -> Generator | None:
    if isinstance(item, torch.Generator):
        return Generator(name, item.get_state, item.set_state)
    if isinstance(item, random.Random):
        return Generator(name, item.getstate, item.setstate)
    if isinstance(item, np.random.RandomState):
        return Generator(name, item.get_state, item.set_state)
    if isinstance(item, np.random.Generator):
        bits: Any = item.bit_generator
        return Generator(name, lambda: bits.state, lambda state: setattr(bits, "state", state))
    return None
