"""Whether a module computes in chunks already, and whether it is the one that was partitioned."""

from typing import Any

from torch import nn

from ds_wsi.partition.module.holdings import PLAIN
from ds_wsi.partition.module.shards import give_anchor
from ds_wsi.runtime.contracts import OfModule


def is_partitioned(module: nn.Module) -> bool:
    """Whether the module computes in chunks, whatever was put over its forward since; or is a layer of mode "paper"."""
    home = getattr(module.__dict__.get("forward"), "__module__", None) or ""
    return home.startswith("ds_wsi.partition.") or give_anchor in module._forward_pre_hooks.values()


def refuse_partitioned_parts(module: nn.Module) -> None:
    """Refuse a module that holds a partitioned one.

    Raises:
        ValueError: names it.
    """
    for name, part in module.named_modules():
        if part is not module and is_partitioned(part):
            raise ValueError(
                f"{type(module).__name__} must not hold a partitioned part, got {name!r}. "
                f"HINT: handle.remove() of {name!r} first, or partition parts side by side."
            )


def refuse_other_holder(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook of a partitioned module: the partition computes with the module that was partitioned.

    A shallow copy has that module's forward, hooks and parts, and attributes of its own. While they are the same the
    result is right for both.

    Raises:
        ValueError: the module is a shallow copy (`copy.copy`, or a replica of nn.DataParallel) and differs.
    """
    forward = module.__dict__.get("forward")
    home = forward.module if isinstance(forward, OfModule) else module
    if home is module or not is_partitioned(module):
        return
    mine, its = vars(module), vars(home)
    for name in {**its, **mine}:
        one, other = mine.get(name, its), its.get(name, mine)  # either is no value of the other
        if one is not other and not (type(one) is type(other) and type(one) in PLAIN and one == other):
            raise ValueError(
                f"a shallow copy of a partitioned {type(home).__name__} must hold what that one holds, got another "
                f"{name!r}. HINT: copy.deepcopy, or change the module that was partitioned."
            )
