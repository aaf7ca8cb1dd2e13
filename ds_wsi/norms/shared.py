"""Train-mode BatchNorm whose population lies on several ranks.

torch's SyncBatchNorm needs a GPU; this works anywhere, for ranks without a tile too, and partitioned layers know it.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ds_wsi.norms.population import (
    after_norm,
    correction,
    merged_over,
    moments_of,
    require_variance,
    takes_population,
    track,
)
from ds_wsi.norms.roles import GROUP, STEP_GROUP, batch_norms, population_group
from ds_wsi.runtime.numerics import memory_layout
from ds_wsi.runtime.seams import AnyBatchNorm


class _SharedNorm(AnyBatchNorm):
    """What `share_norms` puts before a norm's own class: it normalises a population over all ranks of a group."""

    def forward(self, input: Tensor) -> Tensor:
        group = population_group(self)
        if group is None or not takes_population(self):
            return super().forward(input)
        like = input.new_empty(input.shape[1], dtype=torch.promote_types(input.dtype, torch.float32))
        rank_moments = moments_of(input)
        moments = merged_over(group, rank_moments, like)
        require_variance(self, moments, rank_moments)
        assert moments is not None
        track(self, moments.mean, moments.unbiased_var)
        out = _Normalise.apply(input, moments.mean, moments.var, moments.count, self.weight, self.bias, self.eps, group)
        return after_norm(self, out)


class _Normalise(torch.autograd.Function):
    """The norm with given statistics, whose backward knows that they depend on all ranks' elements."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        count: int | Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, mean, var, weight)
        ctx.count, ctx.eps, ctx.group, ctx.has_bias = count, eps, group, bias is not None
        weight, bias = (None if part is None else part.to(mean.dtype) for part in (weight, bias))
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps) if x.numel() else x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradient of `norms.population`'s head: one all-reduce of 2 C numbers."""
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
        scale, shift = correction(gamma, ctx.eps, ctx.count, mean, var, dgamma, dbeta)
        dx = torch.addcmul(dx + shift.view(view), scale.view(view), x.to(scale.dtype))
        # The parameters' gradients are this rank's part: the engine sums the ranks'.
        if weight is None:
            return dx.to(x.dtype), *[None] * 7
        dbias = own_dbeta.to(weight.dtype) if ctx.has_bias else None
        return dx.to(x.dtype), None, None, None, own_dgamma.to(weight.dtype), dbias, None, None


@cache
def _shared_class(kind: type) -> type:
    return type(f"Shared{kind.__name__}", (_SharedNorm, kind), {})


def share_norms(module: nn.Module, group: Any, *, of_step: bool = False) -> Callable[[], None]:
    """Let every BatchNorm of `module` normalise its population over the ranks of `group`, in place.

    A norm that shares with another group already shares with this one from now on. SyncBatchNorm is left alone: its
    population is its own process group's, as its owner chose. From here on each rank of the group must call the module
    as often as the others, if need be with no tile at all; the ranks of a step in training alone.

    Args:
        module: the encoder.
        group: the processes that share.
        of_step: whether its ranks have bags of their own, and share a step. In evaluation such a norm shares with those
            that hold the tiles of a bag, or with none.

    Returns:
        What undoes it.
    """
    key = STEP_GROUP if of_step else GROUP
    before: list[tuple[Any, type, Any]] = []
    for norm in batch_norms(module):
        if isinstance(norm, nn.SyncBatchNorm):
            continue
        kind: type = type(norm)
        before.append((norm, kind, norm.__dict__.get(key)))
        if not isinstance(norm, _SharedNorm):
            norm.__class__ = _shared_class(kind)
        norm.__dict__[key] = group

    def undo() -> None:
        for norm, kind, group_before in before:
            norm.__class__ = kind
            norm.__dict__.pop(key, None)
            if group_before is not None:
                norm.__dict__[key] = group_before
        before.clear()

    return undo
