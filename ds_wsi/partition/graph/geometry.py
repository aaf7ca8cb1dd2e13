"""The numbers of a convolution or a pooling as torch reads them at a call, in whichever form they were given."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

Pair = tuple[int, int]  # the height's and the width's; or what is before, and what is behind


def for_each(value: int | Iterable[int], dims: int) -> tuple[int, ...]:
    """One number per dimension of space: torch takes one for all too, alone or in a tuple or list."""
    numbers = tuple(value) if isinstance(value, Iterable) else (value,)
    return numbers * dims if len(numbers) == 1 else numbers


def pair(value: int | Iterable[int]) -> Pair:
    """The same for images."""
    down, across = for_each(value, 2)
    return down, across


class Geometry(NamedTuple):
    """The numbers of a convolution of images; later changes of the layer do not change them.

    Attributes:
        kernel, stride, dilation: (height, width).
        rows, columns: the padding, (top, bottom) and (left, right).
        groups: the number of groups of channels.
    """

    kernel: Pair
    stride: Pair
    dilation: Pair
    rows: Pair
    columns: Pair
    groups: int

    def out_height(self, height: int) -> int:
        """The rows of the output for an image of `height` rows."""
        return (height + sum(self.rows) - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1


def geometry_of(leaf: Any, weight: Tensor | None = None) -> Geometry:
    """The geometry of an nn.Conv2d as its forward takes it now.

    The kernel is the weight's, whatever the constructor was told. Padding of zeros is what the layer's `padding` says
    at the call; the other modes pad by what the constructor made of it.

    Args:
        leaf: the layer.
        weight: the weight of this call, where it is known; to read a computed one would compute it once more.
    """
    weight = leaf._parameters.get("weight") if weight is None else weight
    # A parameter that an engine holds elsewhere has another shape.
    kernel = pair(leaf.kernel_size if weight is None or weight.dim() != 4 else weight.shape[2:])
    stride, dilation = pair(leaf.stride), pair(leaf.dilation)
    if leaf.padding_mode != "zeros":
        left, right, top, bottom = leaf._reversed_padding_repeated_twice
        return Geometry(kernel, stride, dilation, (top, bottom), (left, right), leaf.groups)
    if leaf.padding == "valid":
        rows, columns = (0, 0), (0, 0)
    elif leaf.padding == "same":
        totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        rows, columns = ((total // 2, total - total // 2) for total in totals)
    else:
        rows, columns = ((each, each) for each in pair(leaf.padding))
    return Geometry(kernel, stride, dilation, rows, columns, leaf.groups)


def pool_options(leaf: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """The options of a pooling of images; a stride that is not given is the kernel's."""
    options = {name: getattr(leaf, name) for name in names}
    if options.get("stride") in (None, (), []):
        options["stride"] = options["kernel_size"]
    return options | {name: pair(options[name]) for name in _PAIRS if name in options}


_PAIRS = ("kernel_size", "stride", "padding", "dilation")
