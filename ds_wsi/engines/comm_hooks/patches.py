"""Attributes of engines that a hook replaces while it is registered."""

from collections.abc import Callable
from types import MethodType
from typing import Any


class Patches:
    """Attributes of instances that are replaced, and put back."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, bool, Any]] = []

    def method(self, owner: Any, name: str, body: Callable[..., Any]) -> Callable[..., Any]:
        """Replace a method of this instance; returns the native one, bound."""
        native: Callable[..., Any] = getattr(owner, name)
        self.value(owner, name, MethodType(body, owner))
        return native

    def value(self, owner: Any, name: str, value: Any) -> None:
        """Replace an attribute of this instance."""
        self._replaced.append((owner, name, name in vars(owner), vars(owner).get(name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put all back, the last first."""
        while self._replaced:
            owner, name, was_there, value = self._replaced.pop()
            if was_there:
                setattr(owner, name, value)
            else:
                delattr(owner, name)
