"""Local updates, which compressed communication is measured beside: LocalSGD, DiLoCo, DiLoCo with chunked top-k.

References for the benchmark: written after the formulas, without checkpoints. Every rank is a site. It takes H steps of
its own optimizer from the shared weights theta; then, with D = theta - its own weights:

    LocalSGD     theta <- mean of the sites' weights                                    (Accelerate's own class)
    DiLoCo       D <- mean of the sites' D;  v <- m v + D;  theta <- theta - a (D + m v)
    and top-k    e <- b e + D;  s = Q(top-k of each chunk of e);  e <- e - s;  theta <- theta - a mean(s)

and all weights become theta; the inner optimizers' moments stay where they are. Q rounds what a tensor sends to a table
of four means. Sources: Stich, Local SGD converges fast and communicates little, ICLR 2019; Douillard et al., DiLoCo,
arXiv:2311.08105; Sarfi et al., SparseLoCo, arXiv:2508.15706.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ds_wsi.engines.accelerator.stepper import Stepper

CHUNK, KEPT = 4096, 64  # an index takes 12 bits; 1.56% of a chunk
_BINS, _SIGMAS = 4, 6.0
_TABLE_BYTES = 4 * _BINS


@dataclass(frozen=True)
class LocalPolicy:
    """How sites train apart and meet.

    Args:
        steps: a round's local steps, H.
        method: "localsgd", "diloco" (whole differences), or "topk" (of each chunk, with error feedback).
        outer_lr: the step along the mean difference, a.
        outer_momentum: Nesterov's, m, of "diloco".
        values: what a whole difference is sent as: "fp32", or "bf16" (summed in float32).
        decay: what the residual keeps of itself per round, b.
    """

    steps: int
    method: str = "localsgd"
    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    values: str = "fp32"
    decay: float = 0.95


def payload_bytes(policy: LocalPolicy, sizes: Sequence[int], ranks: int) -> int:
    """Bytes that all ranks together send in a round, by formula: no headers, no acknowledgements.

    Args:
        policy: the policy.
        sizes: values of each parameter.
        ranks: sites.

    Returns:
        int: a ring's 2 (R-1)/R of everything for each rank; or each rank's message to every other.
    """
    if policy.method == "topk":
        return ranks * (ranks - 1) * sum(message_bytes(size) for size in sizes)
    width = 2 if policy.values == "bf16" and policy.method == "diloco" else 4
    return 2 * (ranks - 1) * width * sum(sizes)


class Meeting:
    """Counts a site's steps, and has the sites meet after every H-th.

    Args:
        policy: the policy.
        stepper: an engine of "ddp", whose gradients stay a site's own from now on.
    """

    def __init__(self, policy: LocalPolicy, stepper: Stepper) -> None:
        self._policy, self._steps = policy, 0
        if policy.method == "localsgd":
            self._local_sgd = stepper.local_sgd(policy.steps)  # never left: leaving it is a round
            return
        self._apart = stepper.model.no_sync()
        self._apart.__enter__()
        self._outer = Outer(policy, stepper.module)

    def after_step(self) -> None:
        """Count one step of the inner optimizer; collective at a round's end."""
        if self._policy.method == "localsgd":
            self._local_sgd.step()
            return
        self._steps += 1
        if self._steps % self._policy.steps == 0:
            self._outer.meet()


class Outer:
    """The shared weights and what they are moved by; the module's parameters follow them at each meeting.

    Args:
        policy: a policy of method "diloco" or "topk".
        module: the site's module, equal on all ranks now.
    """

    def __init__(self, policy: LocalPolicy, module: nn.Module) -> None:
        self._policy, self._parameters = policy, list(module.parameters())
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self._shared = parameters_to_vector(self._parameters).detach().clone()
        self._momentum = torch.zeros_like(self._shared)
        self.residual = torch.zeros_like(self._shared)

    @torch.no_grad()
    def meet(self) -> None:
        """One round: exchange, move the shared weights, take them over."""
        difference = self._shared - parameters_to_vector(self._parameters)
        policy = self._policy
        if policy.method == "topk":
            self._shared -= policy.outer_lr * self._exchange_sparse(difference)
        else:
            mean = _mean_in_bf16(difference) if policy.values == "bf16" else _mean(difference)
            self._momentum.mul_(policy.outer_momentum).add_(mean)
            self._shared -= policy.outer_lr * (mean + policy.outer_momentum * self._momentum)
        vector_to_parameters(self._shared.clone(), self._parameters)

    def _exchange_sparse(self, difference: Tensor) -> Tensor:
        self.residual.mul_(self._policy.decay).add_(difference)
        message = torch.cat([encode(part) for part in self.residual.split(self._sizes)])
        self.residual -= self._decoded(message)
        messages = [torch.empty_like(message) for _ in range(dist.get_world_size())]
        dist.all_gather(messages, message)
        # In the ranks' order on each of them, so that all have the same bits.
        return torch.stack([self._decoded(one) for one in messages]).mean(0)

    def _decoded(self, message: Tensor) -> Tensor:
        parts = message.split([message_bytes(size) for size in self._sizes])
        decoded = [decode(part, size) for part, size in zip(parts, self._sizes, strict=True)]
        return torch.cat(decoded).to(self._shared.dtype)


def _mean(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values / dist.get_world_size()


def _mean_in_bf16(values: Tensor) -> Tensor:
    """The mean, sent as bfloat16 both ways and summed in float32 by the owner of each shard: a ring's bytes, halved."""
    ranks = dist.get_world_size()
    shard = math.ceil(values.numel() / ranks)
    sent = torch.nn.functional.pad(values, (0, shard * ranks - values.numel())).to(torch.bfloat16)
    # As bytes, because gloo has not every type in every collective.
    received = torch.empty_like(sent)
    dist.all_to_all_single(received.view(torch.uint8), sent.view(torch.uint8))
    mean = received.view(ranks, shard).float().mean(0).to(torch.bfloat16)
    shards = [torch.empty_like(mean).view(torch.uint8) for _ in range(ranks)]
    dist.all_gather(shards, mean.view(torch.uint8))
    return torch.cat([part.view(torch.bfloat16) for part in shards])[: values.numel()].to(values.dtype)


# --- a tensor's message: a table of means, indices of 12 bits, codes of 2 ---


def kept_of(size: int) -> int:
    """Values that a tensor of `size` values sends: 64 of each chunk of 4,096, or all of a chunk that has fewer."""
    return size // CHUNK * KEPT + min(KEPT, size % CHUNK)


def message_bytes(size: int) -> int:
    """Bytes of the message of a tensor of `size` values: 16 for the table, 12 bits an index, 2 a value."""
    kept = kept_of(size)
    return _TABLE_BYTES + 3 * math.ceil(kept / 2) + math.ceil(kept / 4)


def encode(values: Tensor) -> Tensor:
    """The largest values of each chunk.

    Args:
        values: floating [n]; chunks are of 4,096 values that lie together (the method's authors take 64 by 64 blocks of
            a matrix).

    Returns:
        Tensor: uint8 [message_bytes(n)].
    """
    whole = len(values) // CHUNK * CHUNK
    kept = []
    for chunks in (values[:whole].view(-1, CHUNK), values[whole:].view(1, -1)):
        indices = chunks.abs().topk(min(KEPT, chunks.shape[1]), dim=1, sorted=False).indices.sort(dim=1).values
        kept.append((indices.flatten(), chunks.gather(1, indices).flatten()))
    codes, table = quantise(torch.cat([sent for _, sent in kept]))
    return torch.cat([table.view(torch.uint8), _pack(torch.cat([at for at, _ in kept]), 12), _pack(codes, 2)])


def decode(message: Tensor, size: int) -> Tensor:
    """What `encode` sent, in zeros: float32 [size].

    Args:
        message: uint8 [message_bytes(size)].
        size: values of the tensor.
    """
    kept = kept_of(size)
    table, indices, codes = message.split([_TABLE_BYTES, 3 * math.ceil(kept / 2), math.ceil(kept / 4)])
    begins = torch.arange(math.ceil(size / CHUNK)).repeat_interleave(KEPT)[:kept] * CHUNK
    values = torch.zeros(size)
    values[begins + _unpack(indices, 12, kept)] = table.clone().view(torch.float32)[_unpack(codes, 2, kept)]
    return values


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """Four bins over six standard deviations about the mean, each with the mean of what is in it.

    Args:
        values: floating [n].

    Returns:
        (codes, table): int64 [n] of 0 to 3, and float32 [4]; an empty bin has 0.
    """
    centred = values - values.mean()
    width = _SIGMAS / _BINS * centred.norm() / math.sqrt(max(1, len(values) - 1))
    codes = (centred / width).round() + _BINS // 2 if width > 0 else torch.full_like(centred, _BINS // 2)
    codes = codes.clamp(0, _BINS - 1).long()
    sums = torch.zeros(_BINS, dtype=values.dtype).index_add_(0, codes, values)
    return codes, (sums / codes.bincount(minlength=_BINS).clamp(min=1)).float()


def _pack(numbers: Tensor, bits: int) -> Tensor:
    """Integers [n] of so many bits, the lowest first, in uint8; 12 bits fill pairs, 2 bits whole bytes."""
    many = {12: 2, 2: 4}[bits]
    padded: Any = torch.nn.functional.pad(numbers, (0, -len(numbers) % many)).view(-1, many)
    words = (padded << bits * torch.arange(many)).sum(1, keepdim=True)
    return (words >> 8 * torch.arange(bits * many // 8) & 255).to(torch.uint8).flatten()


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    many = {12: 2, 2: 4}[bits]
    width = bits * many // 8
    words = (packed.view(-1, width).long() << 8 * torch.arange(width)).sum(1, keepdim=True)
    return (words >> bits * torch.arange(many) & 2**bits - 1).flatten()[:count]
