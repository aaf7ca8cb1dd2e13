"""The norms of a graph whose population no chunk holds whole: statistics, application, the two backward reductions.

The mathematics is `ds_wsi.norms.population`'s.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ds_wsi.norms.population import (
    Moments,
    after_norm,
    correction,
    merged,
    merged_over,
    moments_of,
    require_variance,
    track,
)
from ds_wsi.norms.roles import population_group
from ds_wsi.partition.graph.leaves import home_of
from ds_wsi.runtime.numerics import memory_layout


@dataclass
class Statistics:
    """The statistics of one norm in one call over one population: float32 (float64 for float64), by channel [C].

    Attributes:
        moments: the population's moments, over all ranks once they are final.
        mean, var: the moments' mean and variance, once they are final; var is the biased one.
        dbeta, dgamma: sums of dy and of dy x so far, over all ranks once they are final.
    """

    moments: Moments | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    dbeta: Tensor | None = None
    dgamma: Tensor | None = None
    correction: tuple[Tensor, Tensor] | None = None
    leaves: tuple[Tensor, Tensor] | None = field(default=None, repr=False)


class NormSite:
    """One norm of the graph, seen as batch normalisation with gamma and beta over folded channels.

    BatchNorm's channels are its own. GroupNorm's and InstanceNorm's are (image, group) pairs, with gamma 1 and beta 0:
    their own affine map by channel follows as a pointwise operation.
    """

    def __init__(self, leaf: nn.Module) -> None:
        self.leaf: Any = leaf
        self.batch = isinstance(leaf, _BatchNorm)
        self.acts = not self.batch and home_of(leaf) == "timm.layers.norm_act"  # GroupNormAct

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

    def collect(self, stats: Statistics, z: Tensor) -> None:
        """Merge a chunk's moments into `stats`, in the order of the calls."""
        stats.moments = merged(stats.moments, moments_of(self.fold(z)))

    def finish(self, stats: Statistics, device: torch.device) -> None:
        """Make the statistics final: over all ranks that share the population (one all-gather of 2 C + 2 numbers).

        Raises:
            ValueError: one value per channel, which has no variance.
        """
        local = stats.moments
        if self.group is not None:
            stats.moments = merged_over(self.group, local, self._blank(stats, device))
        moments = stats.moments
        if self.batch:
            require_variance(self.leaf, moments, local)
        assert moments is not None
        stats.mean, stats.var = moments.mean, moments.var

    def _blank(self, stats: Statistics, device: torch.device) -> Tensor:
        """A tensor [C] of the statistics' dtype; of a rank without a tile, of what the norm itself is kept in."""
        if stats.moments is not None:
            return stats.moments.mean
        like = self.leaf.weight if self.leaf.running_mean is None else self.leaf.running_mean
        kind = torch.float32 if like is None else torch.promote_types(like.dtype, torch.float32)
        return torch.zeros(self.leaf.num_features, dtype=kind, device=device)

    def track(self, stats: Statistics, images: int) -> None:
        """Update the running statistics, once per call, as the module itself would: with the unbiased variance."""
        moments = stats.moments
        assert moments is not None
        if self.batch:
            track(self.leaf, moments.mean, moments.unbiased_var)
            return
        # InstanceNorm: the mean over the images; it counts no batches. torch updates the running statistics whenever it
        # does not normalise with them, even where `track_running_stats` was switched off.
        leaf, rate = self.leaf, getattr(self.leaf, "momentum", None) or 0.0
        if getattr(leaf, "running_mean", None) is None or not (leaf.training or not leaf.track_running_stats):
            return
        mean, var = (part.view(images, -1).mean(0) for part in (moments.mean, moments.unbiased_var))
        for running, new in ((leaf.running_mean, mean), (leaf.running_var, var)):
            running.mul_(1 - rate).add_(new.to(running.dtype), alpha=rate)

    @property
    def has_own_affine(self) -> bool:
        """Whether gamma and beta are the module's; else ones and zeros are made."""
        return self.batch and self.leaf.weight is not None and self.leaf.bias is not None

    def affine(self, stats: Statistics) -> tuple[Tensor, Tensor]:
        """Gamma and beta [C] as leaves of the chunk's graph: their gradients are the two reductions."""
        if stats.leaves is None:
            assert stats.mean is not None
            gamma, beta = torch.ones_like(stats.mean), torch.zeros_like(stats.mean)
            if self.batch and self.leaf.weight is not None:
                gamma = self.leaf.weight.detach().to(stats.mean.dtype)
            if self.batch and self.leaf.bias is not None:
                beta = self.leaf.bias.detach().to(stats.mean.dtype)
            stats.leaves = gamma.requires_grad_(), beta.requires_grad_()
        return stats.leaves

    def apply(self, z: Tensor, stats: Statistics) -> Tensor:
        """The norm of a chunk, with the population's statistics."""
        gamma, beta = self.affine(stats)
        if not torch.is_grad_enabled():
            gamma, beta = gamma.detach(), beta.detach()
        leaf, folded = self.leaf, self.fold(z)
        layout = memory_layout(folded)
        out = F.batch_norm(
            folded.contiguous(memory_format=layout), stats.mean, stats.var, gamma, beta, False, 0.0, leaf.eps
        )
        if out.requires_grad:
            # torch 2.15's CPU kernel of the backward returns wrong numbers, silently, where the layouts of gradient and
            # input differ for one image.
            out.register_hook(lambda grad: grad.contiguous(memory_format=layout))
        if self.batch:
            return after_norm(leaf, out)
        out = out.view_as(z)
        # Either may be missing; by channel of z, whatever was folded.
        out = out if leaf.weight is None else out * leaf.weight[:, None, None]
        out = out if leaf.bias is None else out + leaf.bias[:, None, None]
        return leaf.act(leaf.drop(out)) if self.acts else out

    def reduce(self, stats: Statistics, dgamma: Tensor, dbeta: Tensor) -> None:
        """Add a chunk's sums of dy x and of dy."""
        wide = torch.promote_types(dgamma.dtype, torch.float32)
        stats.dgamma = dgamma.to(wide) if stats.dgamma is None else stats.dgamma + dgamma
        stats.dbeta = dbeta.to(wide) if stats.dbeta is None else stats.dbeta + dbeta

    def conclude(self, stats: Statistics) -> tuple[Tensor, Tensor]:
        """Fix the correction of dz, over all ranks of a SyncBatchNorm (one all-reduce of 2 C numbers).

        Returns:
            (dgamma, dbeta) of this rank: the gradients of the module's own parameters.
        """
        assert stats.mean is not None
        assert stats.var is not None
        if stats.dgamma is None or stats.dbeta is None:
            stats.dgamma, stats.dbeta = torch.zeros_like(stats.mean), torch.zeros_like(stats.mean)
        local = stats.dgamma, stats.dbeta
        if self.group is not None:
            both = torch.cat(local)
            dist.all_reduce(both, group=self.group)
            stats.dgamma, stats.dbeta = both.chunk(2)
        assert stats.moments is not None
        gamma, count = self.affine(stats)[0].detach(), stats.moments.count
        stats.correction = correction(gamma, self.leaf.eps, count, stats.mean, stats.var, stats.dgamma, stats.dbeta)
        return local

    def correct(self, stats: Statistics, z: Tensor, grad: Tensor) -> Tensor:
        """Dz of a chunk, from `grad`, what flows to z with constant statistics."""
        assert stats.correction is not None
        folded = self.fold(z)
        view = (1, -1) + (1,) * (folded.dim() - 2)
        scale, shift = (part.view(view) for part in stats.correction)
        wide = torch.addcmul(self.fold(grad) + shift, scale, folded.to(scale.dtype))
        return wide.view_as(grad).to(grad.dtype)


class Corrected(torch.autograd.Function):
    """The identity on z, whose backward adds the correction to the rows that this chunk owns."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, z: Tensor, site: NormSite, stats: Statistics, rows: tuple[int, int] | None
    ) -> Tensor:
        ctx.save_for_backward(z)
        ctx.site, ctx.stats, ctx.rows = site, stats, rows
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # noqa: D102
        (z,), grad = ctx.saved_tensors, grads[0]
        if ctx.rows is None:
            return ctx.site.correct(ctx.stats, z, grad), None, None, None
        first, last = ctx.rows
        corrected = ctx.site.correct(ctx.stats, z[:, :, first:last], grad[:, :, first:last])
        return torch.cat([grad[:, :, :first], corrected, grad[:, :, last:]], dim=2), None, None, None
