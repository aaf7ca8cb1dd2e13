"""Train-mode BatchNorm whose population is a bag that lies on several ranks.

torch's SyncBatchNorm needs a GPU; this works anywhere, with empty shards too, and partitioned layers know it.
"""

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ds_wsi.runtime.numerics import memory_layout


class _SharedNorm(_BatchNorm):
    """What `share_norms` puts before a norm's own class: in training mode it normalises over all ranks of a group."""

    def forward(self, input: Tensor) -> Tensor:
        group = self.__dict__.get("population_group")
        if group is None or not (self.training or self.running_mean is None):
            return super().forward(input)
        mean, var, count = _statistics(input, group)
        if count <= 1:
            raise ValueError(
                f"train-mode {type(self).__name__} must see more than one value a channel, got {count:g}. "
                "HINT: give more tiles, or call eval()."
            )
        self._track(mean, var * (count / (count - 1)))
        out = _Normalise.apply(input, mean, var, count, self.weight, self.bias, self.eps, group)
        for name in ("drop", "act"):  # of timm's BatchNormAct2d
            if hasattr(self, name):
                out = getattr(self, name)(out)
        return out

    def _track(self, mean: Tensor, var: Tensor) -> None:
        if not self.training or self.running_mean is None or self.running_var is None:
            return
        rate = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if rate is None:
                rate = 1.0 / float(self.num_batches_tracked)
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            running.mul_(1 - (rate or 0.0)).add_(new.to(running.dtype), alpha=rate or 0.0)


def _statistics(x: Tensor, group: Any) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance [C] over all ranks' elements, and their number: one all-gather of 2 C + 1 numbers."""
    x, channels = x.detach(), x.shape[1]
    count = x.numel() // channels
    if count == 0:
        mean = var = x.new_zeros(channels, dtype=torch.promote_types(x.dtype, torch.float32))
    elif x.is_cuda:
        mean, invstd = torch.batch_norm_stats(x, 0.0)
        var = invstd.reciprocal().square()
    else:  # in float32: torch's half-precision statistics on a CPU are rounded to it
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var = torch.batch_norm_update_stats(wide, None, None, 0.0)
    own = torch.cat([mean, var * count, mean.new_tensor([float(count)])])
    everyone = own.new_empty(dist.get_world_size(group), len(own))
    dist.all_gather_into_tensor(everyone, own.unsqueeze(0), group=group)
    means, squares, counts = everyone.split([channels, channels, 1], 1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    # Squared deviations from the ranks' means, moved to the common one: no difference of large numbers (Chan et al.).
    var = (squares + counts * (means - mean).square()).sum(0) / total
    return mean, var, float(total)


class _Normalise(torch.autograd.Function):
    """The norm with given statistics, whose backward knows that they depend on all ranks' elements."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        count: float,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, mean, var, weight)
        ctx.count, ctx.eps, ctx.group = count, eps, group
        weight, bias = (None if part is None else part.to(mean.dtype) for part in (weight, bias))
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps) if x.numel() else x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradient dx = gamma invstd (dy - (sum dy + x_hat sum dy x_hat) / n): one all-reduce of 2 C numbers."""
        x, mean, var, weight = ctx.saved_tensors
        view = (1, -1) + (1,) * (x.dim() - 2)
        gamma = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        if x.numel():
            # In the input's layout: torch 2.15's CPU kernel returns wrong numbers for one image in two layouts.
            dy = grads[0].contiguous(memory_format=memory_layout(x))
            # The first term and the two sums are the backward with constant statistics.
            dx, own_dgamma, own_dbeta = torch.ops.aten.native_batch_norm_backward(
                dy, x, gamma, mean, var, None, None, False, ctx.eps, [True, True, True]
            )
        else:
            dx, own_dgamma, own_dbeta = grads[0].clone(), torch.zeros_like(mean), torch.zeros_like(mean)
        sums = torch.cat([own_dgamma, own_dbeta]).to(mean.dtype)
        dist.all_reduce(sums, group=ctx.group)
        dgamma, dbeta = sums.chunk(2)
        invstd = (var + ctx.eps).rsqrt()
        scale = -gamma * invstd.square() / ctx.count * dgamma
        shift = -gamma * invstd / ctx.count * dbeta - scale * mean
        dx = torch.addcmul(dx + shift.view(view), scale.view(view), x.to(scale.dtype))
        # The parameters' gradients are this rank's part: the engine sums the ranks'.
        if weight is None:
            return dx.to(x.dtype), *[None] * 7
        return dx.to(x.dtype), None, None, None, own_dgamma.to(weight.dtype), own_dbeta.to(weight.dtype), None, None


@cache
def _shared_class(kind: type) -> type:
    return type(f"Shared{kind.__name__}", (_SharedNorm, kind), {})


def share_norms(module: nn.Module, group: Any) -> list[tuple[nn.Module, type]]:
    """Let every BatchNorm of `module` normalise over the ranks of `group` in training mode, in place.

    SyncBatchNorm is left alone: its population is its own process group's, as its owner chose.

    Returns:
        (norm, its class before) of each that was changed.
    """
    changed: list[tuple[nn.Module, type]] = []
    for part in module.modules():
        if isinstance(part, _BatchNorm) and not isinstance(part, nn.SyncBatchNorm | _SharedNorm):
            kind: type = type(part)
            changed.append((part, kind))
            part.__class__ = _shared_class(kind)
            part.__dict__["population_group"] = group
    return changed
