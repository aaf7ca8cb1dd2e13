"""Parts of a partitioned module that are called beside it: `encoder.forward_features(x)` passes its forward by."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ds_wsi.runtime.log import logger


class _Depth(threading.local):
    count: int = 0


_depth = _Depth()


@contextmanager
def inside() -> Iterator[None]:
    """While a partition runs the module's parts."""
    _depth.count += 1
    try:
        yield
    finally:
        _depth.count -= 1


class Beside:
    """A forward pre-hook on the children of a partitioned module: it says once that a call is not partitioned."""

    def __init__(self, owner: str) -> None:
        self.owner, self.told = owner, False

    def __call__(self, part: nn.Module, inputs: Any) -> None:
        """See the class."""
        if self.told or _depth.count or not torch.is_grad_enabled():
            return
        self.told = True
        logger.warning(
            "a part of a partitioned %s (%s) was called beside the partition, by forward_features, say: it keeps its "
            "activations as if there were none. HINT: call the module itself, or partition what is called.",
            self.owner,
            type(part).__name__,
        )


def watch_children(module: nn.Module) -> Callable[[], None]:
    """Warn where a child is called beside the module's own forward.

    Returns:
        What takes the hooks off.
    """
    hook = Beside(type(module).__name__)
    handles = [child.register_forward_pre_hook(hook) for child in module.children()]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove
