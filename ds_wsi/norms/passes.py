"""Exact statistics of a population that no call holds whole, for encoders of any kind and without a gradient.

The norms of an encoder depend on each other: what the second averages over is what the first has normalised. So they
are settled one after the other, in the order in which the encoder calls them. Each pass takes every chunk up to the
first norm whose statistics are not known, which adds what it is given to its moments and stops the chunk there; after
the pass that norm is settled, over all ranks of a group. K norms take K passes of growing depth, about K / 2 encodings,
and one more whole one, in the memory of one chunk. A population in one chunk takes one pass: there each norm is settled
on the way.

Nothing of the encoder's code is looked at: whatever calls its BatchNorms in the same order for every chunk is served.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_wsi.norms.population import Moments, after_norm, merged, merged_over, moments_of, require_variance
from ds_wsi.runtime.forwards import Handle

Encode = Callable[[Tensor], Tensor]
_SHARE = 4  # of the memory that is free, one in so many bytes are taken for a population in one chunk


class _ReachedError(Exception):
    """A chunk has come to the norm that is not settled yet."""


class _Settling:
    """The norms' calls of one encoding after the other, by the order in which they come."""

    def __init__(self, group: Any, *, one_chunk: bool) -> None:
        self.group, self.one_chunk = group, one_chunk
        self.settled: list[tuple[nn.Module, Moments]] = []
        self.pending: tuple[Any, Moments | None, Tensor] | None = None
        self._call = 0

    def begin(self) -> None:
        """Another chunk."""
        self._call = 0

    def normalise(self, norm: Any, z: Tensor) -> Tensor:
        """Z [N, C, ...] normalised with the population's statistics."""
        if self._call == len(self.settled):
            _, so_far, _ = self.pending or (norm, None, z)
            like = z.new_empty(z.shape[1], dtype=torch.promote_types(z.dtype, torch.float32))
            self.pending = norm, merged(so_far, moments_of(z)), like
            if not self.one_chunk:
                raise _ReachedError
            self.settle()
        _, moments = self.settled[self._call]
        self._call += 1
        gamma, beta = (None if part is None else part.to(moments.mean.dtype) for part in (norm.weight, norm.bias))
        if not z.numel():
            return after_norm(norm, z.clone())
        return after_norm(norm, F.batch_norm(z, moments.mean, moments.var, gamma, beta, False, 0.0, norm.eps))

    def settle(self) -> bool:
        """Make the pending norm's moments final; False where no chunk stopped: all are."""
        if self.pending is None:
            return False
        (norm, rank_moments, like), self.pending = self.pending, None
        moments = rank_moments if self.group is None else merged_over(self.group, rank_moments, like)
        require_variance(norm, moments, rank_moments)
        assert moments is not None
        self.settled.append((norm, moments))
        return True


@torch.no_grad()
def encode_population(
    encode: Encode,
    chunks: Callable[[], Iterable[Tensor]],
    norms: Sequence[nn.Module],
    *,
    one_chunk: bool = False,
    group: Any = None,
) -> tuple[list[Tensor], list[tuple[nn.Module, Moments]]]:
    """Encode chunks whose norms normalise over all of them together; running statistics do not move.

    Args:
        encode: takes one chunk through the encoder that has the norms, without a gradient.
        chunks: makes an iterator over the chunks, the same ones each time.
        norms: those that normalise over the population; the others normalise as their mode says.
        one_chunk: whether there is one chunk, on every rank of the group.
        group: ranks that have chunks of the same population, each of them one chunk at least, perhaps without a tile:
            one all-gather of 2 C + 2 numbers for each norm.

    Returns:
        What `encode` returned for each chunk, and (norm, moments of its population) of each call of a norm, in order.

    Raises:
        OneValueError: a norm has one value per channel in all.
    """
    settling = _Settling(group, one_chunk=one_chunk)
    with _normalising(norms, settling):
        while True:
            outputs: list[Tensor] = []
            for chunk in chunks():
                settling.begin()
                try:
                    outputs.append(encode(chunk))
                except _ReachedError:
                    outputs = []
            if not settling.settle():
                return outputs, settling.settled


@contextmanager
def _normalising(norms: Sequence[nn.Module], settling: _Settling) -> Iterator[None]:
    handles = [Handle(norm, partial(settling.normalise, norm), "passes over a norm") for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def recalibrate(
    norms: Sequence[nn.Module],
    encode: Encode,
    chunks: Callable[[], Iterable[Tensor]],
    *,
    group: Any = None,
    one_chunk: bool,
) -> None:
    """Take the running statistics of these norms anew, in place, over all chunks as one population.

    They are those of the norms in training mode on all chunks in one call, with the unbiased variance. Arguments and
    collectives are those of `encode_population`.
    """
    norms = [norm for norm in norms if norm.running_mean is not None]
    _, settled = encode_population(encode, chunks, norms, one_chunk=one_chunk, group=group)
    total: dict[nn.Module, Moments | None] = {}
    for norm, moments in settled:  # a norm that is called twice: both calls' populations as one
        total[norm] = merged(total.get(norm), moments)
    for norm, population_moments in total.items():
        assert population_moments is not None
        owner: Any = norm
        owner.running_mean.copy_(population_moments.mean)
        owner.running_var.copy_(population_moments.unbiased_var)


@torch.no_grad()
def fits_in_one_chunk(encoder: nn.Module, encode: Encode, tile: Tensor, n_tiles: int, free_bytes: int) -> bool:
    """Whether so many tiles go through the encoder at once in a quarter of the free memory.

    Without a gradient the most that lives at once is about a layer's input and output, twice (a residual).

    Args:
        encoder: the encoder in whose layers the bytes are counted.
        encode: takes tiles through the encoder.
        tile: [1, 3, S, S]; it is taken twice: a norm without running statistics may refuse one value per channel.
        n_tiles: the population's tiles on this rank.
        free_bytes: free memory of the device.
    """
    largest = 0

    def count(layer: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal largest
        tensors = [value for value in (*inputs, output) if isinstance(value, Tensor)]
        largest = max(largest, sum(value.numel() * value.element_size() for value in tensors))

    hooks = [part.register_forward_hook(count) for part in encoder.modules() if not list(part.children())]
    try:
        encode(torch.cat([tile, tile]))
    finally:
        for hook in hooks:
            hook.remove()
    return largest * n_tiles <= free_bytes // _SHARE
