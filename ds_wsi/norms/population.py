"""The mathematics of batch normalisation over a population that no call, chunk or rank holds whole.

With z the input, x = (z - mean) invstd and n elements per channel, the gradient of a norm over its population is

    dz = gamma invstd dy - gamma invstd / n (sum dy + x sum dy x).

The first term and the two sums are the backward of the norm with constant statistics, part by part; the second term,
`correction`, is linear in z and is added once the sums over all parts, and all ranks, are known.

Everything here is a pure function of tensors, but for `track`, which writes a norm's running statistics. Statistics are
float32, or float64 for float64 inputs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_wsi.runtime.seams import FakeTensor

TORCH_NORMS = "torch.nn.modules.batchnorm"


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of one population, per channel.

    Args:
        count: elements per channel; of a population over ranks float64 [] on the device, because reading it there would
            let the CPU wait.
        mean, m2: [C]; the biased variance is m2 / count.
    """

    count: int | Tensor
    mean: Tensor
    m2: Tensor

    @property
    def var(self) -> Tensor:
        """The biased variance [C]."""
        return self.m2 / self.count

    @property
    def unbiased_var(self) -> Tensor:
        """The variance [C] that running statistics hold."""
        one_less = self.count - 1
        return self.m2 / (one_less.clamp(min=1) if isinstance(one_less, Tensor) else max(one_less, 1))


def moments_of(z: Tensor) -> Moments | None:
    """The moments of z [N, C, ...]; None where it has no element.

    A channel of one value has variance 0, on every device.
    """
    z = z.detach()
    count = z.numel() // z.shape[1] if z.shape[1] else 0
    if count == 0:
        return None
    kind = torch.promote_types(z.dtype, torch.float32)
    if z.is_meta or isinstance(z, FakeTensor):  # planning on shapes alone: the operation has no kernel there
        mean = var = z.new_empty(z.shape[1], dtype=kind)
    else:
        # On a CPU half-precision statistics would be rounded to it; on a GPU they come in float32. Not
        # `batch_norm_stats`, by which a GPU gives 1 / sqrt(0 + 0) = 0: a uniform channel's variance came out infinite.
        wide = z if z.is_cuda else z.to(kind)
        mean, var = torch.batch_norm_update_stats(wide, None, None, 0.0)
    return Moments(count, mean, var * count)


def merged(one: Moments | None, other: Moments | None) -> Moments | None:
    """The moments of two populations taken as one: no difference of large numbers is taken.

    Source: Chan, Golub and LeVeque (1979), the pairwise update.
    """
    if one is None or other is None:
        return other if one is None else one
    total = one.count + other.count
    delta = other.mean - one.mean
    return Moments(
        total,
        one.mean + delta * (other.count / total),
        one.m2 + other.m2 + delta.square() * (one.count * other.count / total),
    )


def merged_over(group: Any, own: Moments | None, like: Tensor) -> Moments | None:
    """The moments over all ranks of a group, merged in the order of the ranks: one all-gather of 2 C + 2 numbers.

    Args:
        group: the ranks that share the population; every one of them must call.
        own: this rank's part; None where it has no element.
        like: [C], of the statistics' device and dtype.

    Returns:
        The same on all ranks; None where no rank has an element.
    """
    channels = len(like)
    blank = torch.zeros(channels, dtype=like.dtype, device=like.device)
    count, mean, m2 = (0, blank, blank) if own is None else (own.count, own.mean, own.m2)
    assert isinstance(count, int)
    # The count in two halves: float32 has no whole numbers beyond 2^24, and a bag has more elements.
    halves = torch.tensor([count >> 20, count & (2**20 - 1)], dtype=mean.dtype)
    sent = torch.cat([mean, m2, halves.to(mean.device, non_blocking=True)])  # staged: the CPU does not wait
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, sent, group=group)
    everyone = torch.stack(parts)
    counts = everyone[:, -2].double() * 2**20 + everyone[:, -1].double()
    if count <= 1 and float(counts.sum()) == 0:  # a rank with elements knows that there are some
        return None
    first, *others = (Moments(number, part[:channels], part[channels:-2]) for number, part in zip(counts, everyone))
    for other in others:
        first = _merged_on_device(first, other)
    return first


def _merged_on_device(one: Moments, other: Moments) -> Moments:
    """The moments that `merged` gives, of counts on the device, either of which may be 0."""
    total = one.count + other.count
    delta, share = other.mean - one.mean, other.count / total.clamp(min=1)  # type: ignore[union-attr]
    return Moments(total, one.mean + delta * share, one.m2 + other.m2 + delta.square() * (one.count * share))


def pooled(parts: Iterable[Moments]) -> Moments:
    """The moments of several populations taken as one, in their order."""
    total: Moments | None = None
    for part in parts:
        total = merged(total, part)
    if total is None:
        raise ValueError("a pool must hold at least one population, got none")
    return total


def correction(
    gamma: Tensor, eps: float, count: int | Tensor, mean: Tensor, var: Tensor, dgamma: Tensor, dbeta: Tensor
) -> tuple[Tensor, Tensor]:
    """The second term of dz as a map of z: dz = (gradient with constant statistics) + scale z + shift.

    Args:
        gamma: weights [C], ones where the norm has none.
        eps, count, mean, var: the norm's and its population's; var is the biased one.
        dgamma, dbeta: sums of dy x and of dy over the population, all ranks included.

    Returns:
        (scale, shift), each [C].
    """
    invstd = (var + eps).rsqrt()
    scale = -gamma * invstd.square() / count * dgamma
    shift = -gamma * invstd / count * dbeta - scale * mean
    return scale, shift


class OneValueError(ValueError):
    """A norm's population has one value per channel, or none: no variance."""


def require_variance(norm: nn.Module, population: Moments | None, own: Moments | None) -> None:
    """Refuse a population of one value per channel, which has no variance.

    Args:
        norm: the norm.
        population: over all ranks.
        own: this rank's part; only a rank that has not two values itself needs to read the population's count.

    Raises:
        OneValueError: names the norm's kind and the remedy.
    """
    if own is not None and own.count > 1:
        return
    count = 0 if population is None else float(population.count)
    if count <= 1:
        raise OneValueError(
            f"train-mode {type(norm).__name__} must see more than one value per channel, got {count:g}. "
            "HINT: give more tiles, or call eval()."
        )


def takes_population(norm: nn.Module) -> bool:
    """Whether a BatchNorm normalises with the statistics of what it is given, not with running ones.

    As torch decides: `track_running_stats` has no say in it where the running statistics are there.
    """
    return bool(norm.training or (norm.running_mean is None and norm.running_var is None))


@torch.no_grad()
def track(norm: Any, mean: Tensor, unbiased_var: Tensor) -> None:
    """Update a norm's running statistics once, as its own forward in training mode would, in place.

    Nothing happens in evaluation mode, nor where the norm tracks none: `track_running_stats` may be switched off while
    the statistics are there, as a finetuning callback does with what it freezes. Where the statistics were taken away,
    batches are counted all the same.
    """
    if not norm.training or not getattr(norm, "track_running_stats", True):
        return
    rate = norm.momentum
    if getattr(norm, "num_batches_tracked", None) is not None:
        norm.num_batches_tracked.add_(1)
        if rate is None:
            rate = 1.0 / float(norm.num_batches_tracked)
    if norm.running_mean is None:
        return
    for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased_var)):
        running.mul_(1 - (rate or 0.0)).add_(new.to(running.device, running.dtype), alpha=rate or 0.0)


def forward_home(kind: type) -> str:
    """The Python module that defines a class's forward, whichever ranks share a norm's population."""
    homes = (base.__module__ for base in kind.__mro__ if "forward" in base.__dict__)
    return next(home for home in homes if home != "ds_wsi.norms.shared")


def after_norm(norm: nn.Module, out: Tensor) -> Tensor:
    """What a norm's own forward does after normalising: timm's BatchNormAct2d holds a drop and an activation.

    torch's own forward calls none: what a norm with that forward holds is for its owner to call.
    """
    if forward_home(type(norm)) == TORCH_NORMS:
        return out
    for name in ("drop", "act"):
        follower = getattr(norm, name, None)
        if follower is not None:
            out = follower(out)
    return out
