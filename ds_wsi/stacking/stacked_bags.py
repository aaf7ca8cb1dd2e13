"""Bags of different length concatenated along the instances, never padded."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

_ON_HOST = "ds_wsi_bounds"  # an attribute of cu_seqlens: the same numbers, for which nobody has to wait


def bounds_of(cu_seqlens: Tensor) -> list[int]:
    """The numbers of cu_seqlens [B + 1] on the host, which waits for the device the first time at most."""
    bounds: list[int] | None = cu_seqlens.__dict__.get(_ON_HOST)
    if bounds is None:
        bounds = cu_seqlens.tolist()
        cu_seqlens.__dict__[_ON_HOST] = bounds
    return bounds


def lengths_of(cu_seqlens: Tensor) -> list[int]:
    """Instances in each bag, on the host: see `bounds_of`."""
    bounds = bounds_of(cu_seqlens)
    return [last - first for first, last in pairwise(bounds)]


def bounds_on(device: torch.device, lengths: Iterable[int]) -> Tensor:
    """cu_seqlens, int64 [B + 1] on a device, of bags of these lengths; without waiting for it."""
    ends = list(accumulate(lengths, initial=0))
    # From memory that is not page-locked the numbers are staged before the call returns.
    return with_bounds(torch.tensor(ends, dtype=torch.int64).to(device, non_blocking=True), ends)


def with_bounds(cu_seqlens: Tensor, bounds: Sequence[int]) -> Tensor:
    """Keep with cu_seqlens [B + 1] its own numbers, where they are known; they must not change from then on."""
    cu_seqlens.__dict__[_ON_HOST] = list(bounds)
    return cu_seqlens


class StackedBags(NamedTuple):
    """Several bags in one tensor, in the variable-length convention of FlashAttention.

    A named tuple, so that DDP, DeepSpeed and FSDP2 move, cast and hook its tensors as they do a tuple's.

    Attributes:
        values: [sum N, ...], tiles (uint8 [sum N, 3, S, S]) or features (floating [sum N, D]).
        cu_seqlens: int64 [B + 1], bag b holds rows cu_seqlens[b] to cu_seqlens[b + 1].
    """

    values: Tensor
    cu_seqlens: Tensor

    @property
    def n_bags(self) -> int:
        """The number of bags, B (`len` is the tuple's, 2)."""
        return self.cu_seqlens.numel() - 1

    @property
    def lengths(self) -> Tensor:
        """Instances in each bag: int64 [B]."""
        return self.cu_seqlens.diff()

    def split(self) -> tuple[Tensor, ...]:
        """The bags as views [N_b, ...]."""
        return self.values.split(lengths_of(self.cu_seqlens))

    def with_values(self, values: Tensor) -> "StackedBags":
        """The same bags holding other values [sum N, ...], such as the features of their tiles."""
        if len(values) != len(self.values):
            raise ValueError(f"values must have one row per instance, {len(self.values)}, got {len(values)}")
        return StackedBags(values, self.cu_seqlens)

    def to(self, device: torch.device | str) -> "StackedBags":
        """Copy both tensors to `device`."""
        bounds = self.cu_seqlens.to(device, non_blocking=True)
        if _ON_HOST in self.cu_seqlens.__dict__:
            bounds = with_bounds(bounds, bounds_of(self.cu_seqlens))
        return StackedBags(self.values.to(device, non_blocking=True), bounds)


def stack_bags(bags: Sequence[Tensor], *, allow_empty: bool = False) -> StackedBags:
    """Concatenate bags [N_i, ...] of one dtype, device and trailing shape.

    Args:
        bags: the bags, in order.
        allow_empty: N_i may be 0, where other ranks hold the bag's instances.

    Returns:
        StackedBags with values [sum N, ...] and cu_seqlens int64 [B + 1] on the bags' device.

    Raises:
        ValueError: no bag, a bag without instances, or bags that do not fit together.
    """
    if not bags:
        raise ValueError("bags must hold at least one bag, got none")
    first = bags[0]
    for index, bag in enumerate(bags):
        if bag.dim() < 2 or (bag.shape[0] == 0 and not allow_empty):
            raise ValueError(f"bag {index} must be [N, ...] with N >= 1, got shape {list(bag.shape)}")
        if bag.shape[1:] != first.shape[1:] or bag.dtype != first.dtype or bag.device != first.device:
            raise ValueError(
                f"bag {index} must match bag 0 ({list(first.shape[1:])}, {first.dtype}, {first.device}), "
                f"got {list(bag.shape[1:])}, {bag.dtype}, {bag.device}"
            )
    bounds = bounds_on(first.device, map(len, bags))
    # One bag is taken as it is, without a copy.
    return StackedBags(first if len(bags) == 1 else torch.cat(list(bags)), bounds)
