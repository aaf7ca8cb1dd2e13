"""Operations as a recorded graph has them: what works in place, or writes through a view, as a function of values."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import node as fx_node
from torch.utils import _pytree as pytree

PURE = {  # in place -> the operation that returns a new tensor
    name + "_": getattr(Tensor, name)
    for name in (
        "add", "sub", "mul", "div", "pow", "neg", "exp", "abs", "sqrt", "rsqrt", "relu", "sigmoid", "tanh", "clamp",
        "clamp_min", "clamp_max", "masked_fill",
    )
}  # fmt: skip
map_aggregate: Any = fx_node.map_aggregate  # whose types know no tensors and no places


@dataclass(frozen=True)
class Here:
    """A stand-in for the tensor that a view is of, among the arguments of the view."""


class Written:
    """An operation that works in place, as one that returns what its argument then holds.

    Args:
        function: the function that writes.
        position: the written tensor's: an index of the arguments, or the name of a keyword.
    """

    def __init__(self, function: Callable[..., Any], position: int | str) -> None:
        self.function, self.position = function, position
        self.__name__ = name_of(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The written tensor's new value."""
        if isinstance(self.position, str):
            written = kwargs[self.position].clone()
            kwargs = {**kwargs, self.position: written}
        else:
            written = args[self.position].clone()
            args = (*args[: self.position], written, *args[self.position + 1 :])
        self.function(*args, **kwargs)
        return written


class ThroughView:
    """A tensor after one of its views has got another value.

    Args:
        hops: functions from the tensor to the view, one after the other.
    """

    def __init__(self, hops: tuple[Callable[..., Any], ...]) -> None:
        self.hops = hops
        self.__name__ = "through_view"

    def __call__(self, base: Tensor, value: Tensor, arguments: Sequence[tuple[Any, Any]]) -> Tensor:
        """`base` with `value` in the place of the view; `arguments` of each hop hold `Here` for the tensor."""
        result = view = base.clone()
        for hop, (args, kwargs) in zip(self.hops, arguments, strict=True):
            view = hop(*in_place_of_here(args, view), **in_place_of_here(kwargs, view))
        if view.untyped_storage()._cdata != result.untyped_storage()._cdata:
            raise RuntimeError("a view that is written must be a view in every chunk, got a copy of its base")
        view.copy_(value)
        return result


class Item:
    """One of an operation's results."""

    def __init__(self, function: Any, key: Any) -> None:
        self.function, self.key, self.__name__ = function, key, "getitem"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result under the key."""
        return self.function(*args, **kwargs)[self.key]


def in_place_of_here(tree: Any, value: Any) -> Any:
    """The arguments of a view, with the tensor that it is a view of."""
    return map_aggregate(tree, lambda leaf: value if isinstance(leaf, Here) else leaf)


def name_of(target: Any) -> str:
    """The name of what a node calls: a sub-module's, or a function's."""
    if isinstance(target, str):
        return target
    name: str = getattr(target, "__name__", type(target).__name__)
    if name == "__get__" and inspect.ismethodwrapper(target):  # a property's: Tensor.T, say
        name = getattr(target.__self__, "__name__", name)
    return name


def tensor_attributes(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are plain attributes of a part."""
    for name, part in module.named_modules():
        for key, value in part.__dict__.items():
            if isinstance(value, Tensor):
                yield (f"{name}.{key}" if name else key), value


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of nested arguments or results, in slices too."""
    tensors: list[Tensor] = []

    def look(item: Any) -> Any:
        if isinstance(item, Tensor):
            tensors.append(item)
        return item

    for leaf in pytree.tree_leaves(tree):
        map_aggregate(leaf, look) if isinstance(leaf, slice) else look(leaf)
    return tensors
