"""What a module's graph depends on, as one key: a graph, or a check, of an earlier key is stale."""

from collections.abc import Iterator
from typing import Any

from torch import nn

PLAIN = (bool, int, float, complex, str, type(None))
_OF_ENGINES = ("ds_", "_ds", "_is_hf", "population_group")


def module_key(module: nn.Module) -> tuple[Any, ...]:
    """Parts, their classes, forwards, modes and plain attributes, and which of their parameters are trained.

    Attributes that engines keep in modules are left out: they change at every step, and no forward reads them. The
    forward of the module itself is left out too: it may be the partition's.
    """
    found: list[Any] = []
    for part in module.modules():
        forward = None if part is module else id(getattr(part.forward, "__func__", part.forward))
        plain = tuple(
            (name, type(value), value) for name, value in plain_attributes(part) if not name.startswith(_OF_ENGINES)
        )
        trained = tuple((name, p is not None and p.requires_grad) for name, p in part._parameters.items())
        found.append((id(part), type(part), forward, plain, trained))
    return tuple(found)


def plain_attributes(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """Numbers, flags, strings and None in a part's attributes; short lists and dicts of such values as tuples."""
    for key, value in part.__dict__.items():
        if type(value) in PLAIN:
            yield key, value
        elif type(value) in (list, tuple, dict) and len(value) <= 64:
            items = tuple(value.items()) if type(value) is dict else tuple((item,) for item in value)
            if all(type(part) in PLAIN for item in items for part in item):
                yield key, items
