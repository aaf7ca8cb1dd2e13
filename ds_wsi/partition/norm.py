"""Normalisation over a population that no chunk holds whole: statistics, application, the two backward reductions.

With z the input, x = (z - mean) invstd and n elements a channel, the gradient is
dz = gamma invstd dy - gamma invstd / n (sum dy + x sum dy x).
The first term and the two sums are the backward of the norm with constant statistics, chunk by chunk; the second term
is added once the sums over all chunks, and all ranks, are known.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ds_wsi.runtime.numerics import memory_layout


@dataclass
class Statistics:
    """Of one norm in one call over one population: float32 (float64 for float64), by channel [C].

    Attributes:
        count: elements a channel, over all ranks once it is final.
        mean, var: of them; var is the biased one.
        dbeta, dgamma: sums of dy and of dy x so far, over all ranks once they are final.
    """

    count: int = 0
    mean: Tensor | None = None
    m2: Tensor | None = None
    var: Tensor | None = None
    dbeta: Tensor | None = None
    dgamma: Tensor | None = None
    correction: tuple[Tensor, Tensor] | None = None
    leaves: tuple[Tensor, Tensor] | None = field(default=None, repr=False)


def population_group(leaf: nn.Module) -> Any:
    """The group that a norm normalises over: SyncBatchNorm's own, or the one that tile parallelism gave it; or None."""
    if not dist.is_initialized():
        return None
    if isinstance(leaf, nn.SyncBatchNorm):
        return leaf.process_group or dist.group.WORLD
    return leaf.__dict__.get("population_group")


class NormSite:
    """One norm of the graph, seen as batch normalisation with gamma and beta over folded channels.

    BatchNorm's channels are its own. GroupNorm's and InstanceNorm's are (image, group) pairs, with gamma 1 and beta 0:
    their own affine map by channel follows as a pointwise operation.
    """

    def __init__(self, leaf: nn.Module) -> None:
        self.leaf: Any = leaf
        self.batch = isinstance(leaf, _BatchNorm)

    @property
    def group(self) -> Any:
        """The process group whose ranks share the population, or None."""
        group = population_group(self.leaf)
        return group if group is not None and dist.get_world_size(group) > 1 else None

    def fold(self, z: Tensor) -> Tensor:
        """Z [N, C, ...] with the normalised channels second."""
        if self.batch:
            return z
        groups = getattr(self.leaf, "num_groups", None) or z.shape[1]
        return z.reshape(1, z.shape[0] * groups, -1, z.shape[3])

    def collect(self, found: Statistics, z: Tensor) -> None:
        """Merge a chunk's mean and squared deviations into `found` (Chan's update, in the order of the calls)."""
        z = self.fold(z)
        count = z.numel() // z.shape[1]
        if count == 0:
            return
        if z.is_cuda:
            mean, invstd = torch.batch_norm_stats(z, 0.0)
            var = invstd.reciprocal().square()
        else:
            # In float32: torch's bfloat16 statistics on a CPU are rounded to it.
            wide = z if z.dtype in (torch.float32, torch.float64) else z.float()
            if z.is_meta:  # where the operation has no kernel
                mean = var = wide.new_empty(z.shape[1])
            else:
                mean, var = torch.batch_norm_update_stats(wide, None, None, 0.0)
        self._merge(found, count, mean, var * count)

    @staticmethod
    def _merge(found: Statistics, count: int, mean: Tensor, m2: Tensor) -> None:
        if found.mean is None or found.m2 is None:
            found.count, found.mean, found.m2 = count, mean, m2
            return
        total = found.count + count
        delta = mean - found.mean
        found.mean = found.mean + delta * (count / total)
        found.m2 = found.m2 + m2 + delta.square() * (found.count * count / total)
        found.count = total

    def finish(self, found: Statistics, device: torch.device) -> None:
        """Make the statistics final: over all ranks of a SyncBatchNorm (one all-gather of 2 C + 1 numbers).

        Raises:
            ValueError: one value a channel, which has no variance.
        """
        if self.group is not None:
            self._gather(found, device)
        assert found.mean is not None
        assert found.m2 is not None
        if self.batch and found.count == 1:
            raise ValueError(
                f"train-mode {type(self.leaf).__name__} must see more than one value a channel, got 1. "
                "HINT: give more tiles, or call eval()."
            )
        found.var, found.m2 = found.m2 / found.count, None

    def _gather(self, found: Statistics, device: torch.device) -> None:
        channels = self.leaf.num_features
        if found.mean is None or found.m2 is None:  # a rank without a tile
            like = self.leaf.weight if self.leaf.running_mean is None else self.leaf.running_mean
            kind = torch.float32 if like is None else torch.promote_types(like.dtype, torch.float32)
            found.mean = found.m2 = torch.zeros(channels, dtype=kind, device=device)
        own = torch.cat([found.mean, found.m2, found.mean.new_tensor([float(found.count)])])
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(everyone, own, group=self.group)
        found.count, found.mean, found.m2 = 0, None, None
        for part in everyone:
            count = int(part[-1])
            if count:
                self._merge(found, count, part[:channels], part[channels:-1])

    def track(self, found: Statistics, images: int) -> None:
        """Update the running statistics, once a call, as the module itself would: with the unbiased variance."""
        leaf = self.leaf
        if not leaf.training or getattr(leaf, "running_mean", None) is None:
            return
        mean, var = found.mean, found.var
        assert mean is not None
        assert var is not None
        var = var * (found.count / max(found.count - 1, 1))
        rate = leaf.momentum
        if not self.batch:  # InstanceNorm: the mean over the images; it counts no batches
            mean, var, rate = mean.view(images, -1).mean(0), var.view(images, -1).mean(0), rate or 0.0
        elif leaf.num_batches_tracked is not None:
            leaf.num_batches_tracked.add_(1)
            if rate is None:
                rate = 1.0 / float(leaf.num_batches_tracked)
        for running, new in ((leaf.running_mean, mean), (leaf.running_var, var)):
            running.mul_(1 - rate).add_(new.to(running.dtype), alpha=rate)

    def affine(self, found: Statistics) -> tuple[Tensor, Tensor]:
        """Gamma and beta [C] as leaves of the chunk's graph: their gradients are the two reductions."""
        if found.leaves is None:
            assert found.mean is not None
            if self.batch and self.leaf.affine:
                gamma, beta = (part.detach().to(found.mean.dtype) for part in (self.leaf.weight, self.leaf.bias))
            else:
                gamma, beta = torch.ones_like(found.mean), torch.zeros_like(found.mean)
            found.leaves = gamma.requires_grad_(), beta.requires_grad_()
        return found.leaves

    def apply(self, z: Tensor, found: Statistics) -> Tensor:
        """The norm of a chunk, with the population's statistics."""
        gamma, beta = self.affine(found)
        if not torch.is_grad_enabled():
            gamma, beta = gamma.detach(), beta.detach()
        leaf, folded = self.leaf, self.fold(z)
        layout = memory_layout(folded)
        out = F.batch_norm(
            folded.contiguous(memory_format=layout), found.mean, found.var, gamma, beta, False, 0.0, leaf.eps
        )
        if out.requires_grad:
            # torch 2.15's CPU kernel of the backward returns wrong numbers, silently, where the layouts of gradient and
            # input differ for one image.
            out.register_hook(lambda grad: grad.contiguous(memory_format=layout))
        if self.batch:
            for name in ("drop", "act"):  # of timm's BatchNormAct2d
                if hasattr(leaf, name):
                    out = getattr(leaf, name)(out)
            return out
        out = out.view_as(z)
        return out if leaf.weight is None else out * leaf.weight[:, None, None] + leaf.bias[:, None, None]

    def reduce(self, found: Statistics, dgamma: Tensor, dbeta: Tensor) -> None:
        """Add a chunk's sums of dy x and of dy."""
        wide = torch.promote_types(dgamma.dtype, torch.float32)
        found.dgamma = dgamma.to(wide) if found.dgamma is None else found.dgamma + dgamma
        found.dbeta = dbeta.to(wide) if found.dbeta is None else found.dbeta + dbeta

    def conclude(self, found: Statistics) -> tuple[Tensor, Tensor]:
        """Fix the correction of dz, over all ranks of a SyncBatchNorm (one all-reduce of 2 C numbers).

        Returns:
            (dgamma, dbeta) of this rank: the gradients of the module's own parameters.
        """
        assert found.mean is not None
        assert found.var is not None
        if found.dgamma is None or found.dbeta is None:
            found.dgamma, found.dbeta = torch.zeros_like(found.mean), torch.zeros_like(found.mean)
        own = found.dgamma, found.dbeta
        if self.group is not None:
            both = torch.cat(own)
            dist.all_reduce(both, group=self.group)
            found.dgamma, found.dbeta = both.chunk(2)
        gamma = self.affine(found)[0].detach()
        invstd = (found.var + self.leaf.eps).rsqrt()
        scale = -gamma * invstd.square() / found.count * found.dgamma
        shift = -gamma * invstd / found.count * found.dbeta - scale * found.mean
        found.correction = scale, shift
        return own

    def correct(self, found: Statistics, z: Tensor, grad: Tensor) -> Tensor:
        """Dz of a chunk, from `grad`, what flows to z with constant statistics."""
        assert found.correction is not None
        folded = self.fold(z)
        view = (1, -1) + (1,) * (folded.dim() - 2)
        scale, shift = (part.view(view) for part in found.correction)
        wide = torch.addcmul(self.fold(grad) + shift, scale, folded.to(scale.dtype))
        return wide.view_as(grad).to(grad.dtype)


class Corrected(torch.autograd.Function):
    """The identity on z, whose backward adds the correction to the rows that this chunk owns."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, z: Tensor, site: NormSite, found: Statistics, rows: tuple[int, int] | None
    ) -> Tensor:
        ctx.save_for_backward(z)
        ctx.site, ctx.found, ctx.rows = site, found, rows
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # noqa: D102
        (z,), grad = ctx.saved_tensors, grads[0]
        if ctx.rows is None:
            return ctx.site.correct(ctx.found, z, grad), None, None, None
        first, last = ctx.rows
        own = ctx.site.correct(ctx.found, z[:, :, first:last], grad[:, :, first:last])
        return torch.cat([grad[:, :, :first], own, grad[:, :, last:]], dim=2), None, None, None
