"""What the parts of a module hold beside parameters, buffers and parts: numbers and tensors, in containers too."""

import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from enum import Enum
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, type(None))
ENGINES = ("ds_", "_ds", "_is_hf", "population_group")
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_INTERNAL = {
    *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "forward", "_is_full_backward_hook"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    *HOOKS,
}
_DICTS = (dict, OrderedDict, defaultdict, Counter)
_ROWS = (list, tuple, torch.Size)
_DEPTH, _MANY = 4, 256  # of containers in containers; items that are looked at
# Objects of these packages are not taken apart: configurations, generators, handles of engines.
_FOREIGN = {
    *("builtins", "torch", "numpy", "random", "functools", "threading", "_thread", "logging", "weakref"),
    *("ds_wsi", "deepspeed", "accelerate", "transformers", "timm", "torchvision", "lightning", "pytorch_lightning"),
}


def containers_of(part: nn.Module) -> list[tuple[Any, Any]]:
    """Lists, dicts, sets, deques and plain objects that a part holds, each with a copy of its content: see `refill`."""
    return [(_box(item), _box(item).copy()) for _, item in _walk(part) if _is_container(item)]


def refill(container: Any, content: Any) -> None:
    """Give a container its content back."""
    if _same(container, content):
        return
    if isinstance(container, list):
        container[:] = content
        return
    container.clear()
    if isinstance(container, deque):
        container.extend(content)
    else:
        container.update(content)


def plain_attributes(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """Numbers, flags, strings and None in a part's attributes; short lists and dicts of such values as tuples."""
    for key, value in part.__dict__.items():
        if type(value) in PLAIN:
            yield key, value
        elif type(value) in (*_ROWS, dict) and len(value) <= 64:
            items = tuple(value.items()) if type(value) is dict else tuple((item,) for item in value)
            if all(type(part) in PLAIN for item in items for part in item):
                yield key, items


def plain_attributes_since(part: nn.Module, before: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Numbers, flags and strings of a part, and short containers of them, that it did not have `before`."""
    for key, _ in plain_attributes(part):
        if _counts(key) and before.get(key) is None and part.__dict__[key] is not None:
            yield key, part.__dict__[key]


def content_key(part: nn.Module) -> tuple[Any, ...]:
    """Equal while a part holds the same: numbers by value, also in containers, and functions and objects by identity.

    Tensors that are attributes are left out, because a graph reads them by their names.
    """
    return tuple(
        (key, type(value), value) if type(value) in PLAIN else (key, _frozen(value, 0))
        for key, value in part.__dict__.items()
        if not (key in _INTERNAL or key.startswith(ENGINES))
    )


def attributes_of(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """Numbers, flags, strings and None of a part, by path: `n`, `meter.n`, `counts['a']`."""
    direct = dict(plain_attributes(part))
    yield from ((key, value) for key, value in direct.items() if _counts(key) and value != ())
    for path, value in _walk(part):
        if type(value) in PLAIN and path not in direct and _first(path) not in direct:
            yield path, value


def tensors_of_part(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers, and tensors that are attributes or in containers, by path."""
    yield from ((name, item) for name, item in part._buffers.items() if item is not None)
    yield from ((path, value) for path, value in _walk(part) if isinstance(value, Tensor))


def hidden_modules(part: nn.Module) -> Iterator[nn.Module]:
    """Modules in attributes and containers, which are no parts of it."""
    part_ids = {id(child) for child in part.modules()}
    yield from (item for _, item in _walk(part) if isinstance(item, nn.Module) and id(item) not in part_ids)


class _Same:
    """An object as a key: equal to itself alone, and to nothing once it is gone, whoever has its place then."""

    def __init__(self, item: Any) -> None:
        self._hash = id(item)
        try:
            self._read: Any = weakref.ref(item)
        except TypeError:
            self._read = lambda: item

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        mine = self._read()
        return isinstance(other, _Same) and mine is not None and mine is other._read()


def _frozen(value: Any, depth: int) -> Any:
    """What of a value a graph may hang on."""
    kind = type(value)
    if kind in PLAIN or isinstance(value, (torch.dtype, torch.device, np.generic, Enum)):
        return kind, value
    if isinstance(value, Tensor):
        return (Tensor, value.requires_grad) if depth == 0 else _Same(value)
    if isinstance(value, np.ndarray) and value.nbytes <= 4096:
        return value.shape, value.dtype.str, value.tobytes()
    if depth < _DEPTH and kind in (*_ROWS, deque):
        return kind, *(_frozen(item, depth + 1) for item in value)
    if depth < _DEPTH and kind in _DICTS:
        return kind, *((_frozen(key, depth + 1), _frozen(item, depth + 1)) for key, item in value.items())
    if kind is set and all(type(item) in PLAIN for item in value):
        return frozenset(value)
    if depth < _DEPTH and _is_record(value):
        return _Same(value), *((key, _frozen(item, depth + 1)) for key, item in vars(value).items())
    return _Same(value)


def _walk(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes and what is in their containers, by path; each container once."""
    waiting = [(key, value, 0) for key, value in part.__dict__.items() if _counts(key)]
    seen: set[int] = set()
    for path, value, depth in waiting:  # grows
        yield path, value
        if depth < _DEPTH and (_is_container(value) or type(value) in _ROWS) and id(value) not in seen:
            seen.add(id(value))
            waiting += [(path + step, item, depth + 1) for step, item in _items(value)]


def _counts(key: str) -> bool:
    return key not in _INTERNAL and not key.startswith(ENGINES)


def _items(container: Any) -> list[tuple[str, Any]]:
    if type(container) in (*_ROWS, deque):
        return [(f"[{index}]", item) for index, item in zip(range(_MANY), container, strict=False)]
    if type(container) is set:
        return [(f"[{item!r}]", True) for item in container if type(item) in PLAIN][:_MANY]
    if type(container) in _DICTS:
        return [(f"[{key!r}]", item) for key, item in list(container.items())[:_MANY]]
    return [(f".{key}", item) for key, item in vars(container).items()]


def _is_container(item: Any) -> bool:
    return type(item) in (list, set, deque, *_DICTS) or _is_record(item)


def _is_record(item: Any) -> bool:
    """Whether it is an object of somebody's class that keeps its state in attributes: a meter, say."""
    if isinstance(item, (nn.Module, Tensor, type, ModuleType, Enum)):
        return False
    home = type(item).__module__.split(".")[0]
    taken_apart = home == "__main__" or not (home in _FOREIGN or home.startswith("_"))
    return taken_apart and type(getattr(item, "__dict__", None)) is dict


def _box(item: Any) -> Any:
    """What holds a container's items."""
    return vars(item) if _is_record(item) else item


def _first(path: str) -> str:
    """The attribute that a path begins with."""
    return path.replace(".", "[").split("[")[0]


def _same(container: Any, content: Any) -> bool:
    if len(container) != len(content):
        return False
    if isinstance(container, dict):
        return [*map(id, container)] == [*map(id, content)] and [*map(id, container.values())] == [
            *map(id, content.values())
        ]
    return container == content if isinstance(container, set) else [*map(id, container)] == [*map(id, content)]
