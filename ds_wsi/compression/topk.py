"""The k entries of a flat tensor that are largest by magnitude: exactly k, the same on every device and every run.

[Note: magnitude as an integer]
The bits of a float32 without its sign, read as an integer, order as the magnitudes do: zero, denormals, normal
numbers, infinity, NaN. Integers compare the same whether or not the processor flushes denormals, and they give NaN a
place: above infinity. A non-finite entry is therefore always selected (for k > 0), so that whoever looks at the k
selected values has seen whether all d are finite.

[Note: candidates]
On a CPU a threshold is guessed from a sample, low enough to pass a few more than k entries, and the exact selection is
made among those. The guess decides the time, never the result: where it passes fewer than k, or most entries (many
are equal), the selection is made among all.
"""

import math

import numpy as np
import torch
from torch import Tensor

_MAGNITUDE = 0x7FFFFFFF
_CHUNK = 1 << 17  # entries; a chunk's keys and mask stay in a core's second-level cache
_SAMPLE = 1 << 16
_SMALL = 1 << 18  # up to here one exact partition is as fast as sampling


def top_k(flat: Tensor, k: int) -> Tensor:
    """Indices of the `k` entries largest by magnitude; of equal ones those with the lowest index.

    Args:
        flat: [d] float32, any device. NaN counts as larger than infinity ([Note: magnitude as an integer]).
        k: 0 to d.

    Returns:
        [k] int64, ascending, on the same device.

    Raises:
        ValueError: another shape or dtype, or k out of range.
    """
    if flat.dim() != 1 or flat.dtype != torch.float32:
        raise ValueError(f"a tensor to select from must be 1-D float32, got {flat.dim()}-D {flat.dtype}")
    d = flat.numel()
    if not 0 <= k <= d:
        raise ValueError(f"k must be in 0..{d} (the tensor's size), got {k}")
    if k in (0, d):
        return torch.arange(k, device=flat.device)
    if flat.device.type != "cpu":
        return _top_k_device(flat.detach(), k)
    return torch.from_numpy(_top_k_cpu(flat.detach().contiguous().numpy().view(np.int32), k))


def nonzero(flat: Tensor) -> Tensor:
    """Ascending int64 indices of the entries that are not zero; [n], on the same device."""
    if flat.device.type != "cpu" or flat.dtype != torch.float32:
        return flat.nonzero().flatten()
    bits = flat.detach().contiguous().numpy().view(np.int32)
    return torch.from_numpy(_passing(bits, 1))  # +0 and -0 have magnitude 0


def _top_k_device(flat: Tensor, k: int) -> Tensor:
    """The indices of the k largest, by torch.topk's smallest value alone: its choice among equals is not defined."""
    keys = flat.view(torch.int32) & _MAGNITUDE
    kth = keys.topk(k, sorted=False).values.min()
    above = (keys > kth).nonzero().flatten()
    equal = (keys == kth).nonzero().flatten()
    return torch.cat([above, equal[: k - above.numel()]]).sort().values


def _top_k_cpu(bits: np.ndarray, k: int) -> np.ndarray:
    d = len(bits)
    if d <= _SMALL:
        return _select(bits & _MAGNITUDE, None, k)
    threshold = max(_sampled_threshold(bits, k), 1)
    candidates = _passing(bits, threshold)
    if len(candidates) < k and threshold == 1:
        # All but the zeros, and the first zeros: no more than len(candidates) other entries come between them.
        zeros = np.flatnonzero(bits[:k] & _MAGNITUDE == 0)[: k - len(candidates)]
        return np.sort(np.concatenate([candidates, zeros]))
    if not k <= len(candidates) <= d // 4:
        return _select(bits & _MAGNITUDE, None, k)
    return _select(bits[candidates] & _MAGNITUDE, candidates, k)


def _sampled_threshold(bits: np.ndarray, k: int) -> int:
    """A key that about k, and four standard deviations more, of the entries reach."""
    # Random positions, not a stride: gradients of embeddings and convolutions are periodic.
    positions = np.random.default_rng(len(bits)).integers(0, len(bits), _SAMPLE)
    expected = _SAMPLE * k / len(bits)
    rank = int(expected + 4 * math.sqrt(expected) + 4)
    if rank >= _SAMPLE:
        return 0
    return int(np.partition(bits[positions] & _MAGNITUDE, _SAMPLE - rank)[_SAMPLE - rank])


def _passing(bits: np.ndarray, threshold: int) -> np.ndarray:
    """Ascending indices of the entries whose magnitude's bits are at least `threshold`."""
    keys, mask = np.empty(_CHUNK, np.int32), np.zeros(_CHUNK, np.bool_)
    indices = [np.zeros(0, np.int64)]
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK]
        size = len(part)
        np.bitwise_and(part, _MAGNITUDE, out=keys[:size])
        np.greater_equal(keys[:size], threshold, out=mask[:size])
        indices.append(np.flatnonzero(mask[:size]) + start)
    return np.concatenate(indices)


def _select(keys: np.ndarray, indices: np.ndarray | None, k: int) -> np.ndarray:
    """The k largest of `keys` (at ascending `indices`; None: everywhere), the first of equal ones."""
    kth = np.partition(keys, len(keys) - k)[len(keys) - k]
    chosen = keys > kth
    equal = np.flatnonzero(keys == kth)
    chosen[equal[: k - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen) if indices is None else indices[chosen]
