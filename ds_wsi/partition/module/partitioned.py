"""Whether a module computes in chunks already."""

from torch import nn

from ds_wsi.partition.module.shards import give_anchor


def is_partitioned(module: nn.Module) -> bool:
    """Whether the module computes in chunks, whatever was put over its forward since; or is a layer of mode "paper"."""
    own = getattr(module.__dict__.get("forward"), "__module__", None) or ""
    return own.startswith("ds_wsi.partition.") or give_anchor in module._forward_pre_hooks.values()


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
