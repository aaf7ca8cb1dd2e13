"""What a module's graph depends on, as one key: a graph of an earlier key is stale."""

from typing import Any

from torch import nn

_PLAIN = (bool, int, float, str, type(None))
_OF_ENGINES = ("ds_", "_ds", "_is_hf", "population_group")


def module_key(module: nn.Module) -> tuple[Any, ...]:
    """Parts, their classes, forwards, modes and plain attributes, and which of their parameters are trained.

    Attributes that engines keep in modules are left out: they change at every step, and no forward reads them.
    """
    found: list[Any] = []
    for part in module.modules():
        attributes = part.__dict__
        forward = None if part is module else attributes.get("forward")
        plain = tuple(
            (name, value)
            for name, value in attributes.items()
            if isinstance(value, _PLAIN) and not name.startswith(_OF_ENGINES)
        )
        trained = tuple(
            parameter.requires_grad for parameter in attributes["_parameters"].values() if parameter is not None
        )
        found.append((id(part), type(part), forward and id(forward), plain, trained))
    return tuple(found)
