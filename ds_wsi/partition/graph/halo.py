"""Blocks of rows with exact halos: which input rows an operation's output rows read, and how a block is computed.

Output rows [a, b) of a window operation read input rows [a s - p, (b - 1) s - p + d (k - 1) + 1). The range is clipped
to the image, what lies outside is padded explicitly, and the operation runs without padding in height; autograd then
crops the padding from the gradient and adds up what overlapping blocks contribute.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ds_wsi.partition.graph.geometry import for_each, geometry_of, pool_options
from ds_wsi.partition.graph.leaves import has_library_forward, has_own_forward
from ds_wsi.partition.module.hooks import is_convolution_2d, weight_of

Range = tuple[int, int]  # rows [first, last)

_POINTWISE_FUNCTIONS = {
    *("add", "sub", "rsub", "mul", "div", "rdiv", "neg", "abs", "exp", "sqrt", "square", "clamp"),
    *("relu", "relu6", "gelu", "silu", "sigmoid", "tanh", "leaky_relu", "elu", "selu", "mish", "hardswish"),
    *("hardsigmoid", "hardtanh", "softplus", "contiguous", "clone", "cat"),
    *("pow", "rsqrt", "reciprocal"),
}
_REDUCTIONS = {"mean", "sum", "var", "std", "amax", "amin", "var_mean", "std_mean"}
_POINTWISE_MODULES = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU),
    *(nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.PReLU),
)


class Pointwise:
    """Each output row reads the same row of its inputs; `leaf` is called on them."""

    def needs(self, rows: Range) -> Range:
        """The input rows that output `rows` read."""
        return rows


class Window(ABC):
    """A convolution or pooling of height `kernel` over an image of `height` rows."""

    def __init__(self, height: int, kernel: int, stride: int, padding: int, dilation: int) -> None:
        self.height, self.kernel, self.stride, self.padding, self.dilation = height, kernel, stride, padding, dilation

    def window(self, rows: Range) -> Range:
        """The rows that output `rows` read of the padded image, counted from the image's first row."""
        first = rows[0] * self.stride - self.padding
        return first, (rows[1] - 1) * self.stride - self.padding + self.dilation * (self.kernel - 1) + 1

    def needs(self, rows: Range) -> Range:
        """The same, of the image; a block wholly inside the padding takes the nearest row, and does not read it."""
        first, last = self.window(rows)
        first = min(max(first, 0), self.height - 1)
        return first, max(first + 1, min(last, self.height))

    def padded(self, image: Tensor, rows: Range, value: float) -> Tensor:
        """The block `image`, which holds rows `needs(rows)`, with `value` in the rows outside of the image."""
        (first, last), (low, high) = self.window(rows), self.needs(rows)
        if last <= 0 or first >= self.height:  # wholly outside
            # Of no row of the image, but on its graph: the correction of a norm's input further back runs all the same.
            return F.pad(image[:, :, :0], (0, 0, 0, last - first), value=value)
        if (first, last) == (low, high):
            return image
        return F.pad(image, (0, 0, low - first, last - high), value=value)

    @abstractmethod
    def __call__(self, image: Tensor, rows: Range) -> Tensor:
        """Output `rows`, [B, C', b - a, W'], of `image`, which holds rows `needs(rows)` of the input."""


class Conv(Window):
    """nn.Conv2d."""

    def __init__(self, height: int, leaf: nn.Conv2d) -> None:
        geometry = geometry_of(leaf)
        super().__init__(height, geometry.kernel[0], geometry.stride[0], geometry.rows[0], geometry.dilation[0])
        self.leaf, self.sides = leaf, geometry.columns

    def _sources(self, rows: Range) -> list[int]:
        """The image row that each row of the window repeats, for padding modes that repeat rows."""
        first, last = self.window(rows)
        return [_repeated_row(row, self.height, self.leaf.padding_mode) for row in range(first, last)]

    def needs(self, rows: Range) -> Range:
        """The hull of the rows that are read: with circular padding the image's other end too."""
        if self.leaf.padding_mode == "zeros":
            return super().needs(rows)
        sources = self._sources(rows)
        return min(sources), max(sources) + 1

    def __call__(self, image: Tensor, rows: Range, like: Tensor | None = None) -> Tensor:
        """Output `rows`, as every window gives them; `like` is that of `convolve`."""
        leaf, (left, right) = self.leaf, self.sides
        if leaf.padding_mode == "zeros":
            image = self.padded(image, rows, 0.0)
        else:
            low, sources = self.needs(rows)[0], self._sources(rows)
            if sources != list(range(low, low + image.shape[2])):
                image = image.index_select(2, torch.tensor(sources, device=image.device) - low)
            image = F.pad(image, (left, right, 0, 0), mode=leaf.padding_mode) if left or right else image
            left = right = 0
        if left != right:
            image, left = F.pad(image, (left, right, 0, 0)), 0
        return convolve(image, leaf, (0, left), like)


class MaxPool(Window):
    """nn.MaxPool2d: the padding never wins."""

    def __init__(self, height: int, options: dict[str, Any]) -> None:
        self.options = options
        super().__init__(height, *(options[name][0] for name in ("kernel_size", "stride", "padding", "dilation")))

    def __call__(self, image: Tensor, rows: Range) -> Tensor:  # noqa: D102
        o = self.options
        image = self.padded(image, rows, -torch.inf)
        return F.max_pool2d(
            image, o["kernel_size"], o["stride"], (0, o["padding"][1]), o["dilation"], ceil_mode=o["ceil_mode"]
        )


class AvgPool(Window):
    """nn.AvgPool2d: sums, divided by what PyTorch divides by at the edges."""

    def __init__(self, height: int, width: int, out_width: int, options: dict[str, Any]) -> None:
        self.options, self.width, self.out_width = options, width, out_width
        kernel, stride, padding = (options[name][0] for name in ("kernel_size", "stride", "padding"))
        super().__init__(height, kernel, stride, padding, 1)

    def __call__(self, image: Tensor, rows: Range) -> Tensor:  # noqa: D102
        o = self.options
        sums = F.avg_pool2d(
            self.padded(image, rows, 0.0),
            o["kernel_size"],
            o["stride"],
            (0, o["padding"][1]),
            ceil_mode=o["ceil_mode"],
            divisor_override=1,
        )
        if o["divisor_override"]:
            return sums / o["divisor_override"]
        down = self._counts(range(*rows), 0, self.height)
        across = self._counts(range(self.out_width), 1, self.width)
        counts = torch.tensor(down, dtype=sums.dtype)[:, None] * torch.tensor(across, dtype=sums.dtype)
        return sums / counts.to(sums.device)

    def _counts(self, outputs: Sequence[int], dim: int, size: int) -> list[int]:
        kernel, stride, padding = (self.options[name][dim] for name in ("kernel_size", "stride", "padding"))
        inside = 0 if self.options["count_include_pad"] else padding
        counts = []
        for index in outputs:
            first = index * stride - padding
            last = min(first + kernel, size + padding)
            counts.append(last - first if not inside else min(last, size) - max(first, 0))
        return counts


class _DeferredConv(torch.autograd.Function):
    """A convolution whose result is known to be read by nobody: backward needs its inputs only."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, weight: Tensor, bias: Tensor | None, shape: Any, dtype: torch.dtype, o: Any
    ) -> Tensor:
        ctx.save_for_backward(image, weight)
        ctx.options, ctx.bias = o, None if bias is None else list(bias.shape)
        return image.new_empty((), dtype=dtype).expand(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        image, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.bias is not None and ctx.needs_input_grad[2]]
        gradients = torch.ops.aten.convolution_backward(
            grads[0], image, weight, ctx.bias, stride, padding, dilation, False, [0] * len(stride), groups, mask
        )
        return (*gradients, None, None, None)


def convolve(image: Tensor, leaf: Any, padding: Sequence[int], like: Tensor | None = None) -> Tensor:
    """The leaf's convolution with another padding, of zeros.

    Args:
        image: [B, C, ...].
        leaf: nn.Conv1d, Conv2d or Conv3d.
        padding: a number for each dimension of space, or one for all.
        like: a tensor of the result's shape and dtype; with it nothing is computed, the graph alone is made.
    """
    dims = len(leaf.kernel_size)
    stride, dilation, padding = (for_each(numbers, dims) for numbers in (leaf.stride, leaf.dilation, padding))
    if like is None:
        function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
        weight, bias = weight_of(leaf, image)
        return function(image, weight, bias, stride, padding, dilation, leaf.groups)
    weight, bias = leaf.weight, leaf.bias
    # Outside of ATen's convolution autocast does not act: cast as it would.
    image, weight = image.to(like.dtype), weight.to(like.dtype)
    bias = None if bias is None else bias.to(like.dtype)
    options = (list(stride), list(padding), list(dilation), leaf.groups)
    return _DeferredConv.apply(image, weight, bias, like.shape, like.dtype, options)


def row_rule(
    node: fx.Node, leaf: nn.Module | None, values: dict[fx.Node, Any], dependent: set[fx.Node]
) -> Pointwise | Window | str:
    """How `node` is computed in blocks of rows, or why it is not.

    Args:
        node: an operation of the graph; its inputs are rows of images.
        leaf: the module it calls, if it calls one.
        values: the values of all nodes: tensors without numbers.
        dependent: nodes whose values depend on the images.
    """
    out = image_of(values[node])
    inputs = [(parent in dependent, image_of(values[parent])) for parent in node.all_input_nodes]
    images = [value for moves, value in inputs if moves and isinstance(value, Tensor) and value.dim() == 4]
    others = [value for moves, value in inputs if isinstance(value, Tensor) and not (moves and value.dim() == 4)]
    if not images or not isinstance(out, Tensor) or out.dim() != 4:
        return "it does not map images [B, C, H, W] to images"
    if leaf is None:
        return _function_rule(node, out, images, others)
    if not (has_library_forward(leaf) or (isinstance(leaf, _BatchNorm) and has_own_forward(leaf))):
        return "it has a forward of its own"
    height, width = images[0].shape[2:]
    if is_convolution_2d(leaf):
        assert isinstance(leaf, nn.Conv2d)
        return Conv(height, leaf)
    if isinstance(leaf, nn.MaxPool2d) and not leaf.return_indices:
        return MaxPool(height, pool_options(leaf, ("kernel_size", "stride", "padding", "dilation", "ceil_mode")))
    if isinstance(leaf, nn.AvgPool2d):
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        return AvgPool(height, width, out.shape[3], pool_options(leaf, names))
    if isinstance(leaf, nn.modules.dropout._DropoutNd):
        return Pointwise() if not leaf.training or leaf.p == 0 else "it draws random numbers for whole images"
    norm = isinstance(leaf, (_BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm))
    # Over one axis: over channels by pixel, as a LayerNorm2d does, or over columns; over several, over rows too.
    by_pixel = isinstance(leaf, nn.LayerNorm) and len(leaf.normalized_shape) == 1
    if norm or by_pixel or isinstance(leaf, _POINTWISE_MODULES):
        return Pointwise()
    return "it is not known to work on rows"


def _function_rule(node: fx.Node, out: Tensor, images: list[Tensor], others: list[Tensor]) -> Pointwise | str:
    name = getattr(node.target, "__name__", str(node.target)).strip("_")
    if node.target is operator.getitem and node.all_input_nodes[0].meta.get("several"):
        return Pointwise()
    if name in _REDUCTIONS and _over_channels(node, images[0], out):
        return Pointwise()
    if name not in _POINTWISE_FUNCTIONS:
        return "it is not known to work on rows"
    if name == "cat" and (node.args[1:] or (node.kwargs.get("dim", 0),))[0] not in (1, -3):
        return "it does not concatenate channels"
    if any(image.shape[2] != out.shape[2] for image in images):
        return "its inputs differ in height"
    if any(other.dim() > 1 and other.shape[-2] != 1 for other in others):
        return "one of its inputs has rows and is no image of the graph"
    return Pointwise()


def image_of(value: Any) -> Any:
    """The value itself, or the first of several images of one height that an operation returns together."""
    images = value if isinstance(value, (tuple, list)) else ()
    heights = {item.shape[2] if isinstance(item, Tensor) and item.dim() == 4 else None for item in images}
    return images[0] if len(heights) == 1 and None not in heights else value


def _over_channels(node: fx.Node, image: Tensor, out: Tensor) -> bool:
    """Whether a reduction leaves every pixel its own value: a norm of channels that somebody wrote by hand."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = list(dim) if isinstance(dim, (tuple, list)) else [dim]
    return dims in ([1], [-3]) and list(out.shape) == [image.shape[0], 1, *image.shape[2:]]


def _repeated_row(row: int, height: int, mode: str) -> int:
    if mode == "circular":
        return row % height
    if mode == "replicate":
        return min(max(row, 0), height - 1)
    if row < 0:
        return -row
    return 2 * (height - 1) - row if row >= height else row
