"""One rank's side of compressed communication: push gradients, pull weights, or a hook that returns the mean.

[Note: push and pull] w is a rank; C selects, D is what a receiver decodes. Both ways have error feedback.

    push  c = r + clip(g);  m = C(c);  r <- c - D(m)
          owner of the shard:  g = (1/W) sum_w D(m_w), in rank order;  theta <- Opt(theta, g)
    pull  q = C(theta - theta_hat);  everyone, the owner too:  theta_hat <- theta_hat + D(q)

Gradients are computed at theta_hat; theta - theta_hat is the owner's residual, and needs no tensor of its own.

Where every rank has the whole optimizer (DDP, ZeRO 0, 3, FSDP2), owners send their means back in place of weights:

    pull  q = C(g);  everyone: theta <- Opt(theta, D(q));  the owner: r <- r + W (g - D(q))

Adam changes all weights at each step, so that few of them are a poor picture of the change; a mean of sparse messages
is sparse. What an owner could not send goes into its own residual, W times, because that enters the mean as 1/W: it
needs no state of its own, and is found by name when shards move. (Both ways with error feedback: Tang et al.,
DoubleSqueeze, ICML 2019.) The mean
weighs ranks alike: with B_w of B bags on rank w, scale its loss by W B_w / B.
(Wu et al., ICML 2025, Algorithm 1, without the printed second use of the learning rate; clipping is before the mask.)

[Note: overflow] A rank whose gradient is not finite says so in place of its messages' lengths. All ranks then discard
the step: no residual changes, and the hook returns NaN for the loss scaler, or the trainer, to find.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_wsi.compression.exchange import OVERFLOW, Ranks, dense_mean, dense_mean_bytes
from ds_wsi.compression.meter import ByteCount
from ds_wsi.compression.policy import DMGC, Cast, TopK
from ds_wsi.compression.residual import Residuals, clip_scale, fold
from ds_wsi.compression.route import Bucket, Route, shards_of, topology_of
from ds_wsi.compression.selection import Selection, select, select_nonzero, spans_of
from ds_wsi.compression.wire import ABSOLUTE, Section, round_values
from ds_wsi.runtime.log import logger

_STEP = "step"
_ANNOUNCED = 8  # bytes of a length


@dataclass(frozen=True)
class Shard:
    """`values`, entries `start`..`stop` of a bucket, as their owner has them."""

    start: int
    stop: int
    values: Tensor


class Compressor:
    """What a policy needs from step to step, on one rank.

    Attributes:
        policy: TopK, DMGC or Cast.
        residuals: the gradients' residuals, by parameter name.
        count: counts the bytes.
        divided: messages of `Cast` so far that float16 would not have held ([Note: range] in exchange.py).
        step: must be the same on all ranks; `next_step` after each optimizer step.
    """

    def __init__(self, policy: TopK | DMGC | Cast) -> None:
        self.policy = policy
        self.residuals = Residuals(policy.momentum if isinstance(policy, TopK) else 0.0)
        self.count = ByteCount()
        self.step = 0
        self.divided = 0
        self._divided_now: list[Tensor] = []  # on their device: read once per step, not once per bucket

    def next_step(self) -> None:
        """The optimizer has stepped."""
        self.step += 1
        now, self._divided_now = self._divided_now, []
        n_now = int(torch.stack(now).sum()) if now else 0
        if n_now and not self.divided:
            logger.warning(
                "gradients beyond float16's range, 65504, at step %d: %d messages were divided by a power of two "
                "before they were sent, and multiplied by it after; further ones are counted. HINT: hook bf16 has the "
                "range of float32; the loss may be a sum where a mean is meant.",
                *(self.step, n_now),
            )
        self.divided += n_now

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors of this rank only (safetensors takes them): residuals, velocities and the step."""
        return self.residuals.state_dict() | {_STEP: torch.tensor([self.step])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`, of the same rank, or of `fold_states` for another number of ranks."""
        state = dict(state)
        if _STEP not in state:
            raise ValueError(f"a compressor's state must hold its {_STEP}, got {sorted(state)}")
        step = int(state.pop(_STEP).item())
        self.residuals.load_state_dict(state)
        self.step = step


def fold_states(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The state for every rank of another world size, from those of all old ranks (`residual.fold`).

    Raises:
        ValueError: states of different steps or parameters.
    """
    steps = {int(state[_STEP].item()) for state in states}
    if len(steps) != 1:
        raise ValueError(f"states to fold must be of one step, got {sorted(steps)}. HINT: give one checkpoint's files")
    rest = [{name: tensor for name, tensor in state.items() if name != _STEP} for state in states]
    return fold(rest) | {_STEP: torch.tensor([steps.pop()])}


def hook(state: Compressor, bucket: Bucket) -> Tensor:
    """The mean of a bucket over the ranks, in a new tensor like its buffer: the same bits on every rank.

    With owners (`sharded`, `server`) their means come back compressed too ([Note: push and pull]).

    Collectives: an announcement, the messages, and with owners another announcement and their messages.
    """
    buffer, policy = bucket.buffer, state.policy
    if isinstance(policy, Cast):
        return _cast_mean(state, bucket, policy.dtype)
    shard = push(state, bucket)
    if shard is None:
        return torch.full_like(buffer, float("nan"))
    if topology_of(policy) == "all_gather":
        return shard.values.to(buffer.dtype)
    ranks = Ranks.of(bucket.group, buffer)
    assert isinstance(policy, DMGC), "only its topologies have owners"
    keep = policy.pull_keep_at(state.step)
    # All of it as float32: owners' sums have more digits than what was sent, and nothing is to be lost.
    spans, values = spans_of(bucket.numels, policy.dense_below), "fp32" if keep == 1 else policy.values
    route = Route(bucket, ranks, spans, shards_of(policy, bucket, ranks, None), values, state.step)
    chosen = select_nonzero(shard.values) if keep == 1 else select(shard.values, route.pieces(ranks.rank), keep)
    mean = torch.zeros(buffer.numel(), device=buffer.device)
    if not _pull(state, route, chosen, mean, flags=0):
        return torch.full_like(buffer, float("nan"))
    if keep < 1:
        unsent = shard.values - mean[shard.start : shard.stop]
        state.residuals.owe(bucket.names, bucket.numels, shard.start, ranks.size * unsent)
    return mean.to(buffer.dtype)


def _cast_mean(state: Compressor, bucket: Bucket, dtype: torch.dtype) -> Tensor:
    ranks = Ranks.of(bucket.group, bucket.buffer)
    by_tensor = {name: numel * dtype.itemsize for name, numel in zip(bucket.names, bucket.numels)}
    crossing = dense_mean_bytes(bucket.buffer.numel(), ranks, dtype)
    for direction, wire_bytes in zip(("push", "pull"), crossing):
        state.count.record(
            direction,
            message_bytes=sum(by_tensor.values()),
            wire_bytes=wire_bytes,
            numels=dict(zip(bucket.names, bucket.numels)),
            by_tensor=by_tensor,
        )
    mean, divided = dense_mean(bucket.buffer, ranks, dtype)
    if dtype == torch.float16:
        state._divided_now.append(divided)
    return mean


def push(state: Compressor, bucket: Bucket, bounds: Sequence[int] | None = None) -> Shard | None:
    """Send a bucket's gradient to the owners of its shards, with error feedback.

    Args:
        bounds: where each rank's shard begins, and the end (W+1 numbers); None: as the topology says. Not for
            `all_gather`, where every rank sums everything.

    Returns:
        The mean over the ranks of this rank's shard, float32 on the buffer's device (with `all_gather`: of the whole
        bucket); None on overflow, on every rank alike ([Note: overflow]).

    Mutates the state's residuals. Collectives: one all-to-all of lengths, one exchange of messages.
    """
    policy = _top_k_policy(state)
    to_all = topology_of(policy) == "all_gather"
    ranks = Ranks.of(bucket.group, bucket.buffer)
    shards = [(0, bucket.buffer.numel())] if to_all else shards_of(policy, bucket, ranks, bounds)
    route = Route(bucket, ranks, spans_of(bucket.numels, policy.dense_below), shards, policy.values, state.step)

    scale = 1.0 if policy.clip_norm is None else clip_scale(bucket.buffer, policy.clip_norm, ranks.size)
    pending = state.residuals.accumulate(bucket.names, bucket.numels, bucket.buffer, scale=scale)
    chosen = select(pending.corrected, route.spans, policy.keep_at(state.step))
    finite = bool(torch.isfinite(chosen.values).all())  # of all entries: the selection takes the others first
    sent = Selection(chosen.indices, round_values(chosen.values, policy.values))
    sections = [route.sections(sent, number) if finite else [] for number in range(len(shards))]
    messages = [route.message(part, number) for number, part in enumerate(sections)]

    announced = ranks.announce([len(message) if finite else OVERFLOW for message in messages])
    if any(OVERFLOW in row for row in announced):
        return None
    shard = 0 if to_all else ranks.rank
    _record(state, "push", route, sections, messages, _crossing(messages, ranks, None if to_all else shard))
    # After the last use of `sent`, which it may change.
    whole = [(span.start, span.stop) for span in route.spans if span.whole]
    state.residuals.commit(pending, sent.indices, sent.values, whole=whole)
    if to_all:
        received = ranks.all_gather(messages[0], [row[0] for row in announced])
    else:
        received = ranks.all_to_all(messages, [row[shard] for row in announced])
    start, stop = shards[shard]
    total = torch.zeros(stop - start, device=bucket.buffer.device)
    for message in received:
        route.read(message, shard, total)
    return Shard(start, stop, total / ranks.size)


def pull_weights(state: Compressor, weights: Tensor, replica: Bucket, bounds: Sequence[int] | None = None) -> None:
    """Bring an owner's new weights to all ranks' replicas, compressed, with error feedback.

    Where everything is kept as float32, the weights themselves are sent, not their changes: a sum of rounded
    differences would not be the weights bit by bit.

    Args:
        weights: [stop - start] float32, theta of this rank's shard after the optimizer's step.
        replica: theta_hat, flat float32; before the first step the same bits on all ranks. Changed in place, and then
            the same bits on all ranks again.
        bounds: see `push`.

    Raises:
        ValueError: a policy without owners, other dtypes or sizes, or weights that are not finite on any rank (the
            replicas are then as they were).

    Collectives: one all-to-all of lengths, another of the messages (of a single owner a broadcast).
    """
    policy = state.policy
    if not isinstance(policy, DMGC) or policy.topology == "all_gather":
        raise ValueError(f"a pull must be of a policy with owners, got {policy}. HINT: DMGC(topology='sharded')")
    ranks = Ranks.of(replica.group, replica.buffer)
    shards = shards_of(policy, replica, ranks, bounds)
    start, stop = shards[ranks.rank]
    if replica.buffer.dtype != torch.float32 or weights.dtype != torch.float32 or weights.numel() != stop - start:
        raise ValueError(
            f"weights must be float32 and of the shard {start}..{stop}, got {weights.dtype}, {len(weights)}"
        )
    spans = spans_of(replica.numels, policy.dense_below)
    route = Route(replica, ranks, spans, shards, policy.values, state.step)

    keep = policy.pull_keep_at(state.step)
    if keep == 1 and policy.values == "fp32":
        chosen, flags = Selection(None, weights.detach()), ABSOLUTE
    else:
        change = weights.detach() - replica.buffer[start:stop]
        chosen, flags = select(change, route.pieces(ranks.rank), keep), 0
    if not _pull(state, route, chosen, replica.buffer, flags):
        raise ValueError("weights must be finite on every rank. HINT: lower the learning rate, or clip")


def _pull(state: Compressor, route: Route, chosen: Selection, into: Tensor, flags: int) -> bool:
    """Every owner's selection, counted from its shard's start, into the flat `into`; False, and no change: overflow."""
    ranks = route.ranks
    finite = bool(torch.isfinite(chosen.values).all())
    sent = Selection(chosen.indices, round_values(chosen.values, route.values))
    start = route.shards[ranks.rank][0]
    message = route.message(route.sections(sent, ranks.rank, start) if finite else [], ranks.rank, flags)
    announced = ranks.announce([len(message) if finite else OVERFLOW])
    if any(OVERFLOW in row for row in announced):
        return False
    messages = ranks.all_gather(message, [row[0] for row in announced])
    shards = [into[first:last] for first, last in route.shards]
    sections = [route.read(one, number, shard, flags) for number, (one, shard) in enumerate(zip(messages, shards))]
    crossing = sum(len(one) for one in messages) - len(message) + _ANNOUNCED * (ranks.size - 1)
    _record(state, "pull", route, sections, messages, crossing)
    return True


def _crossing(messages: Sequence[Tensor], ranks: Ranks, shard: int | None) -> int:
    """Bytes that this rank sends to others: one message to all of them, or one to each but its own."""
    size = sum(len(message) for message in messages)
    size = size * (ranks.size - 1) if shard is None else size - len(messages[shard])
    return size + _ANNOUNCED * len(messages) * (ranks.size - 1)


def _record(
    state: Compressor,
    direction: str,
    route: Route,
    sections: Sequence[Sequence[Section]],
    messages: Sequence[Tensor],
    wire_bytes: int,
) -> None:
    state.count.record(
        direction,
        message_bytes=sum(len(message) for message in messages),
        wire_bytes=wire_bytes,
        numels=dict(zip(route.bucket.names, route.bucket.numels)),
        by_tensor=route.bytes_by_tensor(sections),
    )


def _top_k_policy(state: Compressor) -> TopK:
    if isinstance(state.policy, Cast):
        raise ValueError(f"a push must be of a policy that selects, got {state.policy}. HINT: hook, for a cast")
    return state.policy
