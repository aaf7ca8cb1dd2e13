"""An autograd.Function that a forward applies: one operation, whose backward is its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from ds_wsi.partition.graph.unrecorded import UnrecordedError
from ds_wsi.partition.module.holdings import PLAIN
from ds_wsi.partition.module.hooks import hands_on

_CONSTANTS = (*PLAIN, torch.dtype, torch.device, torch.Size)


class Applied:
    """An autograd.Function as an operation of a graph.

    Args:
        kind: the Function.
        apply: the Function's own `apply`.

    Attributes:
        stands_in: whether it computes nothing of its own: torch's reentrant checkpoint, or an engine's.
    """

    def __init__(self, kind: type, apply: Callable[..., Any]) -> None:
        self.kind, self.apply, self.__name__ = kind, apply, f"apply_{kind.__name__}"
        self.stands_in = kind is CheckpointFunction or hands_on(kind)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What it returns."""
        return self.apply(*args, **kwargs)

    def original(self, *args: Any) -> Any:
        """What a Function that `stands_in` for others returns, computed without it."""
        if self.kind is CheckpointFunction:  # its backward is that of what it calls
            function, _, *inputs = args
            return function(*inputs)
        return args[0]

    def require(self, given: Any, result: Any) -> None:
        """Refuse what is no function of tensors and numbers alone.

        Raises:
            UnrecordedError: it is given a module or a function, which may hold others, or returns what it is given.
        """
        leaves = pytree.tree_leaves(given)
        if not all(isinstance(leaf, (Tensor, *_CONSTANTS)) for leaf in leaves):
            raise UnrecordedError(f"{self.kind.__name__}, an autograd.Function, is given more than tensors and numbers")
        if any(leaf is item for leaf in pytree.tree_leaves(result) for item in leaves if isinstance(item, Tensor)):
            raise UnrecordedError(f"{self.kind.__name__}, an autograd.Function, works in place")


@contextmanager
def applied_functions(call: Callable[[Applied, Any, Any], Any]) -> Iterator[None]:
    """Have every autograd.Function called by another; one whose bound `apply` a module keeps escapes.

    torch calls a Function's forward in Python: what it computes looks like operations of the module.

    Args:
        call: called with the Function, its arguments and its keyword arguments, for its results.
    """
    base: Any = torch.autograd.Function
    original = base.__dict__["apply"]
    calls = [call]

    def apply(kind: Any, *args: Any, **kwargs: Any) -> Any:
        function = original.__get__(None, kind)
        # Who has bound it meanwhile (`op = Fn.apply` in a module that the forward imports) keeps this one for good.
        return calls[0](Applied(kind, function), args, kwargs) if calls else function(*args, **kwargs)

    base.apply = classmethod(apply)
    try:
        yield
    finally:
        base.apply = original
        calls.clear()
