"""Collectives on messages of different lengths, within an explicit group; the same path for one rank and for many."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

OVERFLOW = -1  # announced in place of a length: this rank's gradient is not finite


def even_bounds(d: int, parts: int) -> tuple[int, ...]:
    """Where each of `parts` shards of 0..d begins, and d: sizes differ by 1 at most, the larger ones first."""
    size, more = divmod(d, parts)
    return tuple(part * size + min(part, more) for part in range(parts + 1))


@dataclass(frozen=True)
class Ranks:
    """A process group as the exchanges see it.

    Attributes:
        device: where the group's backend takes tensors; messages are there.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int
    device: torch.device

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, tensor: Tensor) -> "Ranks":
        """The ranks of a group (None: the default one), for the exchange of `tensor`."""
        # gloo takes a CUDA tensor only by way of the host, where the messages are anyway.
        device = torch.device("cpu") if dist.get_backend(group) == "gloo" else tensor.device
        return cls(group, dist.get_rank(group), dist.get_world_size(group), device)

    def announce(self, numbers: Sequence[int]) -> list[list[int]]:
        """Each rank's `numbers`, as many on every rank. One all-to-all: gloo's all-gather puts twice the bytes."""
        mine = torch.tensor([list(numbers)] * self.size, dtype=torch.int64, device=self.device)
        announced = torch.empty_like(mine)
        dist.all_to_all_single(announced, mine, group=self.group)
        return announced.tolist()

    def all_to_all(self, messages: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """Send `messages[r]` to rank r; returns what came from each, of the `lengths` announced. One all-to-all."""
        sent = torch.cat([message.to(self.device) for message in messages])
        received = torch.empty(sum(lengths), dtype=torch.uint8, device=self.device)
        sizes = [len(message) for message in messages]
        dist.all_to_all_single(received, sent, list(lengths), sizes, group=self.group)
        return list(received.split(list(lengths)))

    def all_gather(self, message: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Every rank's message, of the `lengths` announced. One all-to-all; of a single message (a star) one broadcast.

        Not one all-gather of padded messages, which would send more, nor a broadcast from each rank, which costs W
        round trips.
        """
        sources = [source for source, length in enumerate(lengths) if length]
        if len(sources) > 1:
            copies = [message if rank != self.rank else message[:0] for rank in range(self.size)]
            messages = self.all_to_all(
                copies, [length if rank != self.rank else 0 for rank, length in enumerate(lengths)]
            )
        else:
            messages = [torch.empty(length, dtype=torch.uint8, device=self.device) for length in lengths]
        messages[self.rank] = message.to(self.device)
        if len(sources) == 1:
            at = sources[0] if self.group is None else dist.get_global_rank(self.group, sources[0])
            dist.broadcast(messages[sources[0]], at, group=self.group)
        return messages


def dense_mean(flat: Tensor, ranks: Ranks, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The mean of a flat tensor over the ranks, sent as `dtype` and summed as float32, in rank order.

    The same bits on every rank. Shards go to their owners (one all-to-all), their means to everyone: 2 (W-1)/W d values
    from each rank, as a ring. What is not finite arrives as such, for a loss scaler to find.

    [Note: range] float16 ends at 65504. A part with a finite value beyond it is divided by a power of two before it is
    cast, and multiplied by it after: 11 bits of each value remain, as of any other. The exponent is one more float16 at
    the part's end, 0 where nothing is too large: then the bits sent are those of a plain cast.

    Returns:
        [d], of `flat`'s dtype and device; and how many of this rank's parts were divided, a number on its device.
    """
    bounds = even_bounds(flat.numel(), ranks.size)
    sizes = [_raw_bytes(stop - start, dtype) for start, stop in pairwise(bounds)]
    parts, exponents = zip(*(_raw(flat[start:stop], dtype) for start, stop in pairwise(bounds)), strict=True)
    received = ranks.all_to_all(parts, [sizes[ranks.rank]] * ranks.size)
    total = torch.zeros(bounds[ranks.rank + 1] - bounds[ranks.rank], device=ranks.device)
    for part in received:
        total += _wide(part, dtype)
    mean, exponent = _raw(total / ranks.size, dtype)
    means = torch.cat([_wide(part, dtype) for part in ranks.all_gather(mean, sizes)])
    divided = torch.stack([part > 0 for part in (*exponents, exponent.to(flat.device))]).sum()
    return means.to(device=flat.device, dtype=flat.dtype), divided


def _raw(part: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A part's bytes as `dtype`, and the exponent by which it was divided ([Note: range])."""
    part = part.detach()
    if dtype != torch.float16:
        return part.to(dtype).contiguous().view(torch.uint8), torch.zeros((), device=part.device)
    wide = part.to(torch.promote_types(part.dtype, torch.float32))
    finite = torch.where(wide.isfinite(), wide.abs(), torch.zeros_like(wide))
    largest = finite.amax() if len(wide) else wide.new_zeros(())
    exponent = (largest / torch.finfo(dtype).max).log2().ceil().clamp(min=0)
    narrow = torch.cat([wide / exponent.exp2(), exponent[None]]).to(dtype)
    return narrow.contiguous().view(torch.uint8), exponent


def _wide(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 values of a part's bytes."""
    values = raw.clone().view(dtype).float()  # a copy: a part may begin where its dtype cannot
    return values[:-1] * values[-1].exp2() if dtype == torch.float16 else values


def _raw_bytes(n_values: int, dtype: torch.dtype) -> int:
    return (n_values + (dtype == torch.float16)) * dtype.itemsize


def dense_mean_bytes(d: int, ranks: Ranks, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of `dense_mean` that this rank sends to owners, and that it receives from them."""
    bounds = even_bounds(d, ranks.size)
    sizes = [_raw_bytes(stop - start, dtype) for start, stop in pairwise(bounds)]
    others = sum(sizes) - sizes[ranks.rank]
    return others, others
