"""A forward in the place of a module's own, and the way back: one tool for all that change a module in place."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import nn

F = TypeVar("F", bound=Callable[..., Any] | None)


class Handle(Generic[F]):
    """Puts a forward in the place of a module's present one; `remove` puts that back.

    Several may lie over one another. They come off in the opposite order, because each knows only what lay below it.

    Args:
        module: the module whose forward is replaced.
        forward: what is called in its place; None replaces nothing.
        what: a name of what it does to the module, for messages: "a partition".
        undo: functions that put back what else was changed, called in this order before the forward is taken off.

    Attributes:
        forward: the module's present forward; None where there is none, or once it is removed.
    """

    def __init__(self, module: nn.Module, forward: F, what: str, *undo: Callable[[], None]) -> None:
        self.module, self.what, self._undo = module, what, undo
        self.forward: F | None = forward
        self._below = module.__dict__.get("forward")
        if forward is not None:
            module.forward = forward

    def remove(self) -> None:
        """Give the module the forward back that it had. A second call does nothing.

        Raises:
            ValueError: another forward was set over this one since; nothing is removed.
        """
        if self.forward is not None:
            present = self.module.__dict__.get("forward", self.forward)
            if present is not self.forward:
                name = getattr(present, "__qualname__", type(present).__qualname__)
                raise ValueError(
                    f"{self.what} must be the module's forward to be removed, got {name!r} set over it "
                    f"({type(self.module).__name__}). HINT: take that off first."
                )
        for step in self._undo:
            step()
        self._undo = ()
        if self.forward is not None:
            self.module.__dict__.pop("forward", None)
            if self._below is not None:
                self.module.forward = self._below
            self.forward = None
