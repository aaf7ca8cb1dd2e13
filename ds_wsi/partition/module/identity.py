"""What a module's graph depends on, as one key: a graph, or a check, of an earlier key is stale."""

from typing import Any

from torch import nn

from ds_wsi.partition.module.holdings import content_key


def module_key(module: nn.Module) -> tuple[Any, ...]:
    """Parts, their classes, forwards, modes, what they hold, their parameters' shapes and which of them are trained.

    Attributes that engines keep in modules are left out: they change at every step, and no forward reads them. The
    forward of the module itself is left out too: it may be the partition's.
    """
    parts: list[Any] = []
    for part in module.modules():
        forward = None if part is module else id(getattr(part.forward, "__func__", part.forward))
        parameters = tuple((name, p is not None and _seen(p)) for name, p in part._parameters.items())
        parts.append((id(part), type(part), forward, content_key(part), parameters))
    return tuple(parts)


def _seen(parameter: nn.Parameter) -> tuple[Any, ...]:
    """What a graph depends on: another kernel reads other rows. ZeRO-3 keeps the shape of what it has let go."""
    return parameter.requires_grad, tuple(getattr(parameter, "ds_shape", parameter.shape))
