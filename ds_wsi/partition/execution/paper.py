"""Mode "paper": Big-Layers' Algorithms 1 and 2 to the letter, layer by layer: the baseline of all measurements.

No stream, no overlap, pageable memory. One reading note: Algorithm 2, line 10 normalises with the BATCH statistics, as
BatchNorm does; the running ones are updated once, with the unbiased variance.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ds_wsi.norms.population import Moments, after_norm, moments_of, pooled, takes_population, track

_CPU = torch.device("cpu")
_CHANNELS = (0, 2, 3)  # all axes but the channels'
# Algorithm 1, line 10: cheap layers work where their input is. timm's are known by their home: it is not imported here.
_CHEAP_HOMES = (
    "torch.nn.modules.activation",
    "torch.nn.modules.dropout",
    "timm.layers.activations",
    "timm.layers.drop",
)
_CHEAP = (nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.Sequential)
_REMEDY = 'HINT: choose mode "lean", "recompute" or "offload", or keep this layer out of the module.'


@dataclass(frozen=True)
class _Setting:
    """The arguments of `apply_paper`."""

    device: torch.device
    axis: str
    chunk: int
    stop_bytes: int

    def place(self, n_bytes: int) -> torch.device:
        """Where a map lives: its size alone decides, so that the two maps of a residual addition meet in one place."""
        return self.device if n_bytes <= self.stop_bytes else _CPU

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The sub-tensors of a map [N, C, H, W], views."""
        return x.split(self.chunk, dim=0 if self.axis == "batch" else 2)

    def load(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x` on the device; cast there, so that the link carries the stored dtype."""
        return x.to(self.device).to(dtype)


class _Window(NamedTuple):
    tiles: slice  # of input and output
    rows: slice  # of the input
    out_rows: slice
    pad: tuple[int, int, int, int]  # left, right, top, bottom


def _out_height(leaf: nn.Conv2d, height: int) -> int:
    _, _, top, bottom = leaf._reversed_padding_repeated_twice
    return (height + top + bottom - leaf.dilation[0] * (leaf.kernel_size[0] - 1) - 1) // leaf.stride[0] + 1


def _windows(setting: _Setting, leaf: nn.Conv2d, x: Tensor) -> Iterator[_Window]:
    """What each sub-tensor of a convolution reads and writes: tiles, or output rows with their halos."""
    # Padding as F.pad counts it, also that of padding="same", whose two sides may differ.
    left, right, top, bottom = leaf._reversed_padding_repeated_twice
    tiles, height, out = x.shape[0], x.shape[2], _out_height(leaf, x.shape[2])
    size = tiles if setting.axis == "batch" else out
    for start in range(0, size, setting.chunk):
        stop = min(start + setting.chunk, size)
        if setting.axis == "batch":
            yield _Window(slice(start, stop), slice(0, height), slice(0, out), (left, right, top, bottom))
            continue
        # Rows [o0, o1) read [o0 s - p, (o1 - 1) s - p + d (k - 1) + 1), which may lie wholly in the padding.
        first = start * leaf.stride[0] - top
        last = (stop - 1) * leaf.stride[0] - top + leaf.dilation[0] * (leaf.kernel_size[0] - 1) + 1
        low, high = (min(max(row, 0), height) for row in (first, last))
        above = min(max(-first, 0), last - first)
        pad = (left, right, above, last - first - (high - low) - above)
        yield _Window(slice(0, tiles), slice(low, high), slice(start, stop), pad)


class _Conv(torch.autograd.Function):
    """Algorithm 1, lines 3-9, for a convolution: x [N, C, H, W] in CPU RAM, the output where its size belongs."""

    @staticmethod
    def forward(ctx: Any, setting: _Setting, leaf: nn.Conv2d, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        ctx.setting, ctx.leaf = setting, leaf
        ctx.save_for_backward(x, weight)
        # Detached: autocast's cache would hand a cast copy without a graph to a later native use of the parameter.
        w, b = (None if p is None else p.detach().to(setting.device) for p in (weight, bias))
        assert w is not None
        out = None
        for window in _windows(setting, leaf, x):
            piece = F.pad(x[window.tiles, :, window.rows].to(setting.device), window.pad)
            y = F.conv2d(piece, w, b, leaf.stride, 0, leaf.dilation, leaf.groups)
            if out is None:  # autocast has chosen the dtype
                shape = (x.shape[0], y.shape[1], _out_height(leaf, x.shape[2]), y.shape[3])
                place = setting.place(math.prod(shape) * y.element_size())
                out = torch.empty(shape, dtype=y.dtype, device=place)
            out[window.tiles, :, window.out_rows] = y
        assert out is not None
        ctx.dtype = out.dtype  # with it the backward repeats what autocast did
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        setting, leaf = ctx.setting, ctx.leaf
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[2:]
        wide = torch.promote_types(weight.dtype, torch.float32)
        w = setting.load(weight, ctx.dtype)
        dx = torch.zeros(x.shape, dtype=x.dtype) if needs_x else None
        dw = torch.zeros(weight.shape, dtype=wide, device=setting.device)
        db = torch.zeros(weight.shape[0], dtype=wide, device=setting.device)
        options = (leaf.stride, (0, 0), leaf.dilation, False, (0, 0), leaf.groups)
        for window in _windows(setting, leaf, x):
            piece = F.pad(setting.load(x[window.tiles, :, window.rows], ctx.dtype), window.pad)
            dy = grad[window.tiles, :, window.out_rows].to(setting.device)
            mask = (needs_x, needs_weight, False)
            dpiece, dpart, _ = torch.ops.aten.convolution_backward(dy, piece, w, None, *options, mask)
            if dx is not None:
                left, _, top, _ = window.pad
                rows = window.rows.stop - window.rows.start
                inner = dpiece[:, :, top : top + rows, left : left + x.shape[3]]
                dx[window.tiles, :, window.rows] += inner.to(_CPU).to(x.dtype)  # halos overlap
            if needs_weight:
                dw += dpart
            if needs_bias:
                db += dy.sum(_CHANNELS, dtype=wide)
        dweight = dw.to(weight.device, weight.dtype) if needs_weight else None
        return None, None, dx, dweight, db.to(weight.device, weight.dtype) if needs_bias else None


class _Normalise(torch.autograd.Function):
    """Algorithm 2, lines 13-18: x [N, C, H, W] and output in CPU RAM; mean and var [C] in float32 (float64)."""

    @staticmethod
    def forward(
        ctx: Any, setting: _Setting, eps: float, of_batch: bool, mean: Tensor, var: Tensor, x: Tensor, *affine: Any
    ) -> Tensor:
        ctx.setting, ctx.eps, ctx.of_batch = setting, eps, of_batch
        ctx.save_for_backward(x, mean, var, *affine)
        gamma, beta = (None if part is None else setting.load(part, mean.dtype) for part in affine)
        out = torch.empty(x.shape, dtype=x.dtype)
        for piece, into in zip(setting.split(x), setting.split(out), strict=True):
            into.copy_(F.batch_norm(piece.to(setting.device), mean, var, gamma, beta, False, 0.0, eps))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, mean, var, *affine = ctx.saved_tensors
        setting, invstd = ctx.setting, (var + ctx.eps).rsqrt()
        needs_x, *needs_affine = ctx.needs_input_grad[5:]
        scale = invstd if affine[0] is None else invstd * setting.load(affine[0], mean.dtype)
        column = (slice(None), None, None)

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:  # dy and the normalised x
            for piece, dy in zip(setting.split(x), setting.split(grad), strict=True):
                normal = (setting.load(piece, mean.dtype) - mean[column]) * invstd[column]
                yield setting.load(dy, mean.dtype), normal

        dgamma, dbeta = torch.zeros_like(mean), torch.zeros_like(mean)
        if ctx.of_batch or any(needs_affine):
            for dy, normal in pairs():
                dgamma += (dy * normal).sum(_CHANNELS)
                dbeta += dy.sum(_CHANNELS)
        dx = torch.empty(x.shape, dtype=x.dtype) if needs_x else None
        if dx is not None:
            count = x.numel() // x.shape[1]
            for (dy, normal), into in zip(pairs(), setting.split(dx), strict=True):
                if ctx.of_batch:
                    dy = dy - (dbeta[column] + normal * dgamma[column]) / count
                into.copy_((dy * scale[column]).to(x.dtype))
        found = zip((dgamma, dbeta), affine, needs_affine, strict=True)
        return *(None,) * 5, dx, *(total.to(p.device, p.dtype) if needed else None for total, p, needed in found)


def _statistics(setting: _Setting, x: Tensor) -> Moments:
    """Algorithm 2, lines 4-8: the moments of x, merged from those of its sub-tensors in order."""
    wide = torch.promote_types(x.dtype, torch.float32)
    pieces = (moments_of(setting.load(stored, wide)) for stored in setting.split(x))
    return pooled(piece for piece in pieces if piece is not None)


def _normalised(setting: _Setting, name: str, leaf: Any, x: Tensor) -> Tensor:
    of_batch = takes_population(leaf)
    with torch.no_grad():
        if of_batch:
            if x.numel() == x.shape[1]:
                raise ValueError(
                    f"train-mode BatchNorm must see more than one value a channel, got 1 (layer {name}). "
                    "HINT: give more tiles, or call eval()."
                )
            moments = _statistics(setting, x)
            # Line 9: once, with the unbiased variance.
            track(leaf, moments.mean, moments.unbiased_var)
            mean, var = moments.mean, moments.var
        else:
            wide = torch.promote_types(x.dtype, torch.float32)
            mean, var = (setting.load(part, wide) for part in (leaf.running_mean, leaf.running_var))
    out = _Normalise.apply(setting, leaf.eps, of_batch, mean, var, x, leaf.weight, leaf.bias)
    return after_norm(leaf, out)  # cheap layers, on the CPU


def _partitioned(setting: _Setting, name: str, leaf: nn.Module) -> Callable[[Tensor], Tensor]:
    """The forward of a convolution or a BatchNorm."""
    native = leaf.forward

    def forward(x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(
                f"input must be [N, C, H, W], got {tuple(x.shape)} (layer {name}). HINT: x[None] for one image."
            )
        small = x.nbytes <= setting.stop_bytes
        if small or x.device.type != "cpu":
            out = native(x.to(setting.device))
            # A bottleneck's last convolution may outgrow the limit again; its shortcut is in CPU RAM.
            return out.to(setting.place(out.nbytes)) if small else out
        if not isinstance(leaf, nn.Conv2d):
            return _normalised(setting, name, leaf, x)
        if _out_height(leaf, x.shape[2]) < 1:
            raise ValueError(
                f"input must be at least as high as the kernel, got {tuple(x.shape)} (layer {name}). "
                "HINT: give larger images."
            )
        return _Conv.apply(setting, leaf, x, leaf.weight, leaf.bias)

    return forward


def _cheap(setting: _Setting, leaf: nn.Module) -> Callable[..., Any]:
    """The forward of a cheap layer: where its input is; then Algorithm 1, lines 14-16."""
    native = leaf.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = native(x, *args, **kwargs)
        stays = not isinstance(out, Tensor) or x.device.type != "cpu"
        return out if stays else out.to(setting.place(out.nbytes))

    return forward


def _other(setting: _Setting, leaf: nn.Module) -> Callable[..., Any]:
    """The forward of any other layer: on the device, and so is all that follows."""
    native = leaf.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return native(*(arg.to(setting.device) if isinstance(arg, Tensor) else arg for arg in args), **kwargs)

    return forward


def _layers(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers of the paper by qualified name: convolutions, norms, and modules without children."""
    children = list(module.named_children())
    if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) or not children:
        yield name or type(module).__name__, module
        return
    own = [key for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    if own:
        raise ValueError(
            f'a module with children must own no tensor in mode "paper", got {own[0]!r} '
            f"(module {name or type(module).__name__}, {type(module).__name__}). {_REMEDY}"
        )
    for key, child in children:
        yield from _layers(child, f"{name}.{key}" if name else key)


def _forward_of(setting: _Setting, name: str, leaf: nn.Module) -> Callable[..., Any]:
    known, home = type(leaf).forward.__qualname__, type(leaf).__module__
    if "forward" in leaf.__dict__:
        raise ValueError(
            f'a layer must have the forward of its class in mode "paper", got another (layer {name}). '
            "HINT: undo the earlier partition or hook first."
        )
    if isinstance(leaf, (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm)):
        if known not in ("Conv2d.forward", "_BatchNorm.forward", "BatchNormAct2d.forward"):
            raise ValueError(
                f'a layer must be Conv2d, BatchNorm2d or BatchNormAct2d in mode "paper", got {type(leaf).__name__} '
                f"(layer {name}). {_REMEDY}"
            )
        if getattr(leaf, "padding_mode", "zeros") != "zeros":
            raise ValueError(
                f'padding_mode must be "zeros" in mode "paper", got {leaf.padding_mode!r} (layer {name}). {_REMEDY}'
            )
        return _partitioned(setting, name, leaf)
    cheap = isinstance(leaf, _CHEAP) or home.startswith(_CHEAP_HOMES)
    if cheap and next(leaf.parameters(), None) is None:  # a PReLU's weight is on the device
        return _cheap(setting, leaf)
    return _other(setting, leaf)


def apply_paper(
    module: nn.Module, *, device: torch.device, axis: str, chunk: int, stop_bytes: int = 0
) -> Callable[[], None]:
    """Compute `module` layer by layer with its large maps in CPU RAM, in place: the paper's method as printed.

    Conv2d and BatchNorm2d bring sub-tensors to `device` one by one, forward and backward. Activations, dropout and
    local pooling work where their input is. Everything else (global pooling, Linear) moves its input to `device`.
    The numbers are the module's own: train-mode BatchNorm normalises over the whole call, gradients of weights are
    summed in float32 (float64 for float64), the autocast of the forward holds in the backward.

    Only the instance attribute `forward` of layers changes; the state_dict does not. BatchNorm's running statistics are
    updated as ever. With `stop_bytes`, branches may only be joined by operations on maps of one shape (residuals).

    Args:
        module: a CNN with its parameters on `device`; its input [N, C, H, W] is given in CPU RAM, floating point. The
            output is on `device` after a layer of the last kind, else where its size puts it.
        device: where sub-tensors are computed.
        axis: "batch" (sub-tensors of tiles) or "spatial" (of rows, convolutions with exact halos).
        chunk: tiles, or output rows, of a sub-tensor.
        stop_bytes: maps of at most as many bytes live on `device`, and layers that read them run there natively.

    Returns:
        The undo function.

    Raises:
        ValueError: an argument is out of range; a layer is not supported (another padding_mode, SyncBatchNorm, a
            subclass with a forward of its own, a module with children and tensors of its own, partitioned already).

    Source: Big-Layers, Algorithm 1 (layers) and Algorithm 2 (BatchNorm).
    """
    if axis not in ("batch", "spatial"):
        raise ValueError(
            f'axis must be "batch" or "spatial", got {axis!r} (apply_paper). HINT: "batch" for bags of tiles.'
        )
    for key, value, least in (("chunk", chunk, 1), ("stop_bytes", stop_bytes, 0)):
        if value < least:
            raise ValueError(f"{key} must be at least {least}, got {value} (apply_paper). HINT: give {least} or more.")
    setting = _Setting(torch.device(device), axis, chunk, stop_bytes)
    layers = {leaf: name for name, leaf in _layers(module, "")}  # a layer used twice counts once
    forwards = {leaf: _forward_of(setting, name, leaf) for leaf, name in layers.items()}  # all, or none at an error
    for leaf, forward in forwards.items():
        leaf.forward = forward

    def undo() -> None:
        for leaf, forward in forwards.items():
            if leaf.__dict__.get("forward", forward) is not forward:
                raise ValueError(
                    "a partition must be the layer's forward to be removed, got another set over it "
                    f"(layer {layers[leaf]}). HINT: take that off first."
                )
        for leaf, forward in forwards.items():
            if leaf.__dict__.get("forward") is forward:
                del leaf.__dict__["forward"]

    return undo
