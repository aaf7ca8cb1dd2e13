"""Mode "paper"'s two layers on maps in CPU RAM: a convolution and a batch normalisation, sub-tensor by sub-tensor.

Source: Big-Layers, Algorithm 1 (layers) and Algorithm 2 (BatchNorm).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_wsi.norms.population import Moments, moments_of, pooled
from ds_wsi.partition.graph.geometry import Geometry
from ds_wsi.partition.module.surroundings import carrier_of, once_differentiable, refuse_batched

_CPU = torch.device("cpu")
_CHANNELS = (0, 2, 3)  # all axes but the channels'


class Carrier:
    """What refuses a second derivative of a Function of these tensors; in a box, or it would be one of its inputs."""

    def __init__(self, *tensors: Tensor | None) -> None:
        self.tensor = carrier_of(*(tensor for tensor in tensors if tensor is not None))


@dataclass(frozen=True)
class Setting:
    """The arguments of `apply_paper`: where maps live, and what of one is computed at once."""

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


def _windows(setting: Setting, shape: Geometry, x: Tensor) -> Iterator[_Window]:
    """What each sub-tensor of a convolution reads and writes: tiles, or output rows with their halos."""
    (top, bottom), (left, right) = shape.rows, shape.columns  # of padding="same" they may differ
    tiles, height, out = x.shape[0], x.shape[2], shape.out_height(x.shape[2])
    size = tiles if setting.axis == "batch" else out
    for start in range(0, size, setting.chunk):
        stop = min(start + setting.chunk, size)
        if setting.axis == "batch":
            yield _Window(slice(start, stop), slice(0, height), slice(0, out), (left, right, top, bottom))
            continue
        # Rows [o0, o1) read [o0 s - p, (o1 - 1) s - p + d (k - 1) + 1), which may lie wholly in the padding.
        first = start * shape.stride[0] - top
        last = (stop - 1) * shape.stride[0] - top + shape.dilation[0] * (shape.kernel[0] - 1) + 1
        low, high = (min(max(row, 0), height) for row in (first, last))
        above = min(max(-first, 0), last - first)
        pad = (left, right, above, last - first - (high - low) - above)
        yield _Window(slice(0, tiles), slice(low, high), slice(start, stop), pad)


class Convolution(torch.autograd.Function):
    """Algorithm 1, lines 3-9, for a convolution: x [N, C, H, W] in CPU RAM, the output where its size belongs."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, setting: Setting, shape: Geometry, carrier: Carrier, x: Tensor, weight: Tensor, bias: Any
    ) -> Tensor:
        ctx.setting, ctx.shape, ctx.carrier = setting, shape, carrier.tensor
        ctx.save_for_backward(x, weight)
        # Detached: autocast's cache would hand a cast copy without a graph to a later native use of the parameter.
        w, b = (None if p is None else p.detach().to(setting.device) for p in (weight, bias))
        assert w is not None
        out = None
        for window in _windows(setting, shape, x):
            piece = F.pad(x[window.tiles, :, window.rows].to(setting.device), window.pad)
            y = F.conv2d(piece, w, b, shape.stride, 0, shape.dilation, shape.groups)
            if out is None:  # autocast has chosen the dtype
                size = (x.shape[0], y.shape[1], shape.out_height(x.shape[2]), y.shape[3])
                device = setting.place(math.prod(size) * y.element_size())
                out = torch.empty(size, dtype=y.dtype, device=device)
            out[window.tiles, :, window.out_rows] = y
        assert out is not None
        ctx.dtype = out.dtype  # with it the backward repeats what autocast did
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # noqa: D102
        refuse_batched(grad)
        x, weight = ctx.saved_tensors
        setting, shape = ctx.setting, ctx.shape
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[3:]
        wide = torch.promote_types(weight.dtype, torch.float32)
        w = setting.load(weight, ctx.dtype)
        dx = torch.zeros(x.shape, dtype=x.dtype) if needs_x else None
        dw = torch.zeros(weight.shape, dtype=wide, device=setting.device)
        db = torch.zeros(weight.shape[0], dtype=wide, device=setting.device)
        options = (shape.stride, (0, 0), shape.dilation, False, (0, 0), shape.groups)
        for window in _windows(setting, shape, x):
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
        return None, None, None, dx, dweight, db.to(weight.device, weight.dtype) if needs_bias else None


class Normalise(torch.autograd.Function):
    """Algorithm 2, lines 13-18: x [N, C, H, W] and output in CPU RAM; mean and var [C] in float32 (float64)."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        setting: Setting,
        eps: float,
        of_batch: bool,
        carrier: Carrier,
        mean: Tensor,
        var: Tensor,
        x: Tensor,
        *affine: Any,
    ) -> Tensor:
        ctx.setting, ctx.eps, ctx.of_batch, ctx.carrier = setting, eps, of_batch, carrier.tensor
        ctx.save_for_backward(x, mean, var, *affine)
        gamma, beta = (None if part is None else setting.load(part, mean.dtype) for part in affine)
        out = torch.empty(x.shape, dtype=x.dtype)
        for piece, into in zip(setting.split(x), setting.split(out), strict=True):
            into.copy_(F.batch_norm(piece.to(setting.device), mean, var, gamma, beta, False, 0.0, eps))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # noqa: D102
        refuse_batched(grad)
        x, mean, var, *affine = ctx.saved_tensors
        setting, invstd = ctx.setting, (var + ctx.eps).rsqrt()
        needs_x, *needs_affine = ctx.needs_input_grad[6:]
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
        sums = zip((dgamma, dbeta), affine, needs_affine, strict=True)
        return *(None,) * 6, dx, *(total.to(p.device, p.dtype) if needed else None for total, p, needed in sums)


def statistics(setting: Setting, x: Tensor) -> Moments:
    """Algorithm 2, lines 4-8: the moments of x, merged from those of its sub-tensors in order."""
    wide = torch.promote_types(x.dtype, torch.float32)
    pieces = (moments_of(setting.load(stored, wide)) for stored in setting.split(x))
    return pooled(piece for piece in pieces if piece is not None)
