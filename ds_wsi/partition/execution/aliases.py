"""The parameters and buffers that a module is called with, as its chunks and its backward see them.

[Note: aliases] Chunks do not differentiate parameters, but aliases of them, which stand in their places while a pass
runs. A hook that somebody has put on a parameter then runs once, on the sum that autograd is handed, and not on every
chunk's part. And backward reads what the call was given, by `torch.func.functional_call` say, not what the module holds
by then. An alias shares its parameter's memory and version counter. It is made while the parameter is whole (ZeRO-3
gathers it around forward and backward), and lives no longer than the graphs that are built on it.
"""

import threading
from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_GUARD = threading.Lock()
_LOCKS: "WeakKeyDictionary[nn.Module, threading.RLock]" = WeakKeyDictionary()


class _Place(NamedTuple):
    registry: MutableMapping[str, Any]
    key: str
    tensor: Tensor
    name: str


class CallTensors:
    """What the module held when it was called: see [Note: aliases].

    Args:
        module: the module that is called.
        save: whether backward will follow; else nothing is noted.

    Attributes:
        names: what each tensor is, by its id: "parameter 'c2.weight'".
        aliases: the tensor that stands in each trainable parameter's place now, by the parameter's id; empty between
            passes.
    """

    def __init__(self, module: nn.Module, *, save: bool) -> None:
        self._module = module
        self._places: list[_Place] = []
        for name, part in module.named_modules() if save else ():
            for kind, registry in (("parameter", part._parameters), ("buffer", part._buffers)):
                for key, tensor in registry.items():
                    if tensor is not None:
                        full = f"{kind} {(name + '.' + key if name else key)!r}"
                        self._places.append(_Place(registry, key, tensor, full))
        self.names = {id(entry.tensor): entry.name for entry in reversed(self._places)}
        self._trained = {
            id(tensor): tensor
            for registry, _, tensor, name in self._places
            if name.startswith("parameter") and tensor.requires_grad
        }
        self.aliases: dict[int, Tensor] = {}

    @contextmanager
    def in_place(self) -> Iterator[dict[int, Tensor]]:
        """The call's buffers, and new aliases of its parameters, in the module; as it was at the end.

        Other threads that differentiate the same module wait.
        """
        with exclusive(self._module):
            aliases = {key: _alias(tensor) for key, tensor in self._trained.items()}
            before: list[tuple[MutableMapping[str, Any], str, Any]] = []
            try:
                for registry, key, tensor, _ in self._places:
                    replacement, present = aliases.get(id(tensor), tensor), registry.get(key)
                    if present is not replacement:
                        before.append((registry, key, present))
                        registry[key] = replacement
                for part in self._module.modules():
                    # torch's recurrent layers read a list of their own.
                    flat = part.__dict__.get("_flat_weights")
                    if flat:
                        before.append((part.__dict__, "_flat_weights", flat))
                        part.__dict__["_flat_weights"] = [aliases.get(id(weight), weight) for weight in flat]
                self.aliases = aliases
                yield aliases
            finally:
                self.aliases = {}
                for registry, key, present in reversed(before):
                    if present is None and not isinstance(registry.get(key), list):
                        del registry[key]  # taken away between forward and backward
                    else:
                        registry[key] = present

    def of_affine(self, norm: Any, gradients: tuple[Tensor, Tensor]) -> list[tuple[Any, Tensor]]:
        """Pairs (parameter, gradient) of a norm, from the gradients of its gamma and its beta.

        Those of a parametrized gamma go on to what it is computed from.
        """
        with torch.enable_grad():
            made = norm.weight, norm.bias
        originals = {id(alias): self._trained[key] for key, alias in self.aliases.items()}
        parameter_grads: list[tuple[Any, Tensor]] = []
        for tensor, gradient in zip(made, gradients, strict=True):
            if tensor is None or not tensor.requires_grad:
                continue
            if id(tensor) in originals:
                parameter_grads.append((originals[id(tensor)], gradient))
                continue
            below = [parameter for parameter in norm.parameters() if parameter.requires_grad]
            grads = torch.autograd.grad(tensor, below, gradient.to(tensor.dtype), allow_unused=True)
            pairs = zip(below, grads, strict=True)
            parameter_grads += [(originals[id(alias)], grad) for alias, grad in pairs if grad is not None]
        return parameter_grads


def exclusive(module: nn.Module) -> AbstractContextManager[Any]:
    """What keeps other threads from putting aliases into the module, and waits until theirs are gone."""
    with _GUARD:
        return _LOCKS.setdefault(module, threading.RLock())


def trainable(parameters: list[nn.Parameter], aliases: dict[int, Tensor]) -> tuple[list[nn.Parameter], list[Tensor]]:
    """The parameters of a part of the graph that need a gradient, and the tensors that chunks differentiate for them.

    The aliases first, then the parameters themselves: a module may have kept one where nobody looks for it, in a list.
    One that was frozen since the call cannot be differentiated, and need not: autograd drops what its alias is given.
    """
    ordered = sorted((p for p in parameters if id(p) in aliases), key=lambda p: not p.requires_grad)
    return ordered, [*(aliases[id(parameter)] for parameter in ordered), *(p for p in ordered if p.requires_grad)]


def summed(gradients: list[Tensor | None], count: int) -> list[Tensor | None]:
    """The gradients of `trainable`'s `count` parameters from those of its tensors; `gradients` is emptied."""
    direct = [*gradients[count:], *[None] * (2 * count - len(gradients))]
    both = list(zip(gradients[:count], direct, strict=True))
    gradients.clear()
    return [two if one is None else one if two is None else one + two for one, two in both]


def _alias(tensor: Tensor) -> Tensor:
    # Code may ask whether it is a parameter.
    return nn.Parameter(tensor) if type(tensor) is nn.Parameter else tensor.detach().requires_grad_()
