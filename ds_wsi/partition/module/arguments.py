"""What a partitioned module is called with: its tiles, and what stands beside them."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call beside the tiles.

    Args:
        name: the name of the keyword that the tiles were given by; None where they came first.
        args: the arguments that follow the tiles.
        kwargs: the keyword arguments beside the tiles.

    Attributes:
        tensors: path -> tensor that all tiles share; a path is `args[0]` or `masks['n']`, say.
    """

    name: str | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def bind(
        cls, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], owner: str
    ) -> tuple[Any, "Arguments"]:
        """The tiles of a call, and what stands beside them.

        The tiles are the first argument, or what is given under the name of the forward's first parameter.

        Args:
            forward: the module's, whose names they are.
            args, kwargs: the call's arguments.
            owner: the module's class, for errors.

        Raises:
            TypeError: the forward takes no such arguments, or no tiles are given.
        """
        try:
            signature = inspect.signature(forward)
        except ValueError:  # a builtin
            signature = inspect.Signature([inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)])
        signature.bind(*args, **kwargs)  # raises what the module's own call would
        if args:
            return args[0], cls(None, tuple(args[1:]), dict(kwargs))
        first = next(iter(signature.parameters.values()), None)
        name = None if first is None or first.kind in (first.VAR_POSITIONAL, first.VAR_KEYWORD) else first.name
        if name not in kwargs:
            raise TypeError(
                f"a partitioned {owner} must be given its tiles first, or as {name or 'the first argument'!r}, "
                f"got {sorted(kwargs)}"
            )
        beside = {key: value for key, value in kwargs.items() if key != name}
        return kwargs[name], cls(name, (), beside)

    def call(self, forward: Callable[..., Any], tiles: Any) -> Any:
        """`forward` with these tiles and what stands beside them."""
        if self.name is None:
            return forward(tiles, *self.args, **self.kwargs)
        return forward(**{self.name: tiles}, **self.kwargs)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors beside the tiles, by their path."""
        return {path: value for path, value in self._leaves() if isinstance(value, Tensor)}

    def require_shared(self, tiles: int, owner: str) -> None:
        """Refuse what cannot be told to be shared by all tiles.

        Raises:
            ValueError: a tensor with as many rows as there are tiles, or one that needs a gradient; or what is no
                number, flag, string, None, or a tuple, list or dict of them.
        """
        rule = "an argument beside the tiles must be a number, a flag, a string, None, or a tensor that all tiles share"
        for path, value in self._leaves():
            if isinstance(value, Tensor):
                if value.requires_grad:
                    raise ValueError(f"{rule}, got {path} of {owner}, which requires a gradient.")
                if value.dim() and value.shape[0] == tiles and tiles > 1:
                    raise ValueError(
                        f"{rule}, got {path} {list(value.shape)} of {owner} for {tiles} tiles. "
                        "HINT: partition the part of the module that does not need it."
                    )
            elif not isinstance(value, _PLAIN):
                raise ValueError(f"{rule}, got {path} of {owner}, a {type(value).__name__}.")

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for calls of which one graph is right: plain values, and what tensors look like."""
        parts: list[Any] = [self.name, len(self.args)]
        for path, value in self._leaves():
            if isinstance(value, Tensor):
                parts.append((path, "tensor", tuple(value.shape), value.dtype, value.device))
            elif isinstance(value, _PLAIN):
                parts.append((path, type(value).__name__, value))
            else:
                parts.append((path, id(value)))
        return tuple(parts)

    def replaced(self, tensors: Mapping[str, Tensor]) -> "Arguments":
        """The same with other tensors in their places."""

        def walk(path: str, value: Any) -> Any:
            if isinstance(value, Tensor):
                return tensors.get(path, value)
            if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
                return type(value)(walk(f"{path}[{index}]", item) for index, item in enumerate(value))
            if type(value) is dict:
                return {key: walk(f"{path}[{key!r}]", item) for key, item in value.items()}
            return value

        args = tuple(walk(f"args[{index}]", value) for index, value in enumerate(self.args))
        return Arguments(self.name, args, {key: walk(key, value) for key, value in self.kwargs.items()})

    def _leaves(self) -> list[tuple[str, Any]]:
        leaves: list[tuple[str, Any]] = []

        def walk(path: str, value: Any) -> None:
            if type(value) in (list, tuple):
                for index, item in enumerate(value):
                    walk(f"{path}[{index}]", item)
            elif type(value) is dict:
                for key, item in value.items():
                    walk(f"{path}[{key!r}]", item)
            else:
                leaves.append((path, value))

        for index, value in enumerate(self.args):
            walk(f"args[{index}]", value)
        for key in sorted(self.kwargs):
            walk(key, self.kwargs[key])
        return leaves
