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

from ds_wsi.norms.population import after_norm
from ds_wsi.norms.roles import GROUP
from ds_wsi.partition.module.identity import plain_attributes

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_INTERNAL = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", *_HOOKS}


class LocalNorm(_BatchNorm):
    """A SyncBatchNorm for the time of a trial: this rank's tiles alone, no collective."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        """As of BatchNorm, and what timm's own adds."""
        return after_norm(self, super().forward(input))


@dataclass(frozen=True)
class Generator:
    """A source of random numbers.

    Args:
        name: for errors; "" for torch's default generators.
        read, write: its state.
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
        module: of which parts.
        device: the device that computes.
        dtype: of the floating-point stand-ins; None for each one's own.
    """

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.module, self.device, self.dtype = module, device, dtype
        self.names = {part: name for name, part in module.named_modules()}
        self.generators = [*default_generators(device), *own_generators(module)]
        self._saved: list[tuple[nn.Module, type, dict[str, Any]]] = []
        self._base: dict[nn.Module, dict[str, Any]] = {}
        self._containers: list[tuple[Any, Any]] = []

    def __enter__(self) -> "Restored":
        self._states = [generator.read() for generator in self.generators]
        self._saved = [(part, type(part), dict(part.__dict__)) for part in self.names]
        stand_ins: dict[int, Any] = {}
        for part, kind, held in self._saved:
            base = dict(held)
            base["_parameters"] = {name: self._parameter(item, stand_ins) for name, item in part._parameters.items()}
            for name in _HOOKS:
                if name in base:
                    base[name] = OrderedDict((key, hook) for key, hook in base[name].items() if computes_weight(hook))
            base.pop(GROUP, None)
            self._base[part] = base
            self._containers += containers_of(part)
            if issubclass(kind, nn.SyncBatchNorm):
                part.__class__ = LocalNorm
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
        self._refill()
        copies: dict[int, Tensor] = {}
        with torch.no_grad():
            for part, base in self._base.items():
                part.__dict__.clear()
                part.__dict__.update(base)
                buffers = base["_buffers"]
                part.__dict__["_buffers"] = {name: self._copy(item, copies) for name, item in buffers.items()}
                for name, item in base.items():
                    if type(item) is Tensor and item.grad_fn is None:
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
        """Buffers and tensors that are attributes, by qualified name."""
        found = {}
        for part, name in self.names.items():
            for key, item in (*part._buffers.items(), *part.__dict__.items()):
                if isinstance(item, Tensor) and item.grad_fn is None:
                    found[f"{name}.{key}" if name else key] = item
        return found

    def attributes(self) -> dict[tuple[str, str], Any]:
        """Plain values of every part, and in its lists and dicts, by (part, attribute)."""
        return {
            (name, key): value
            for part, name in self.names.items()
            for key, value in plain_attributes(part)
            if not (key == "forward" or key in _INTERNAL)
        }

    def _refill(self) -> None:
        for container, content in self._containers:
            refill(container, content)

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
        return copies[id(tensor)]


def default_generators(device: torch.device) -> list[Generator]:
    """Torch's, which the partition replays, and numpy's and Python's."""
    found = [Generator("", torch.get_rng_state, torch.set_rng_state)]
    if device.type == "cuda":
        found.append(
            Generator(
                "", lambda: torch.cuda.get_rng_state(device), lambda state: torch.cuda.set_rng_state(state, device)
            )
        )
    return [*found, *foreign_generators()]


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
                found = _generator(item, f"{name}.{key}" if name else key)
                if found is not None and id(item) not in seen:
                    seen.add(id(item))
                    yield found


def containers_of(part: nn.Module) -> list[tuple[Any, Any]]:
    """Lists, dicts and sets among a part's attributes, each with a copy: see `refill`."""
    own = [item for key, item in part.__dict__.items() if key not in _INTERNAL]
    return [(item, item.copy()) for item in own if type(item) in (list, dict, set)]


def refill(container: Any, content: Any) -> None:
    """Give a container its content back."""
    if type(container) is list:
        container[:] = content
    else:
        container.clear()
        container.update(content)


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
