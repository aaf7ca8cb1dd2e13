"""What all engines share of a communication hook: its call on a bucket, and the steps of its state.

[Note: passes] A pass is one reduction of every parameter's gradient, of which an optimizer step has one. It ends when
the engine says that it has stepped or, of an engine that does not say it, when a name comes again. A state in which a
pass is open is not saved: `settle` ends it.

[Note: loss scale] Under a loss scale gradients grow and shrink with it, and a residual outlives it: the hook gets
them divided by it. A pass in which a gradient was not finite is skipped by the optimizer, so that the residuals go back
to what they were before it ([Note: overflow] in compressor.py); only where there is a scale are they kept for that.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_wsi.compression import (
    DMGC,
    Bucket,
    ByteCount,
    Cast,
    Compressor,
    KeepSchedule,
    Shard,
    TopK,
    hook,
    push,
)

Hook = Callable[[Any, Bucket], Tensor]


class Dense:
    """The state of `allreduce`: it only counts."""

    def __init__(self) -> None:
        self.count = ByteCount()


def allreduce(state: Dense, bucket: Bucket) -> Tensor:
    """The engine's own: sum, then the mean, in the buffer and its dtype. One all-reduce."""
    world = dist.get_world_size(bucket.group)
    dist.all_reduce(bucket.buffer, group=bucket.group)
    size = bucket.buffer.element_size()
    by_tensor = {name: numel * size for name, numel in zip(bucket.names, bucket.numels)}
    dense = sum(by_tensor.values())
    for direction in ("push", "pull"):
        state.count.record(
            direction,
            message_bytes=dense,
            wire_bytes=dense * (world - 1) // world,  # half of a ring's
            numels=dict(zip(bucket.names, bucket.numels)),
            by_tensor=by_tensor,
        )
    return bucket.buffer.div_(world)


def whole_policy(policy: TopK | DMGC | Cast) -> TopK | DMGC | Cast:
    """A policy that keeps nothing back, for one process, which sends nothing."""
    if isinstance(policy, Cast):
        return Cast(torch.float32)
    if isinstance(policy, DMGC):
        policy = replace(policy, pull_keep=None)
    return replace(policy, keep=1.0, values="fp32", schedule=KeepSchedule())


def whole(state: Compressor, bucket: Bucket) -> Tensor:
    """One process's gradient, as it is; with what more processes owed when they saved their state, where they did."""
    policy = state.policy
    if isinstance(policy, Cast):
        return bucket.buffer
    if not policy.momentum and policy.clip_norm is None and not state.residuals.owes(bucket.names):
        return bucket.buffer
    return hook(state, bucket)


class Reducer:
    """Takes an engine's flat gradients through a hook.

    Args:
        hook: `hook(state, bucket)`, the mean over the ranks.
        state: the hook's state; a `Compressor`'s steps are kept here.
        step_of: the engine's number of optimizer steps; None: it has none ([Note: passes]).
        loss_scale: the factor that gradients carry; None: none, ever.
    """

    def __init__(
        self,
        hook: Hook,
        state: Any,
        *,
        step_of: Callable[[], int] | None = None,
        loss_scale: Callable[[], float] | None = None,
    ) -> None:
        self.hook, self.state = hook, state
        self._step_of, self._loss_scale = step_of, loss_scale
        self._open, self._number, self._seen = False, 0, set[str]()
        self._before: Any = None
        self._overflowed = False

    def mean(
        self, buffer: Tensor, names: Sequence[str], numels: Sequence[int], group: dist.ProcessGroup | None
    ) -> Tensor:
        """The hook's mean of a bucket, of the buffer's shape and dtype. The buffer's content is lost."""
        self._begin(names)
        if self.hook is allreduce:  # the engine's own sum, in its own units
            return self.hook(self.state, Bucket(buffer, names, numels, group))
        scale = self._scale()
        given = buffer if scale == 1.0 else buffer.float() / scale
        mean = self.hook(self.state, Bucket(given, names, numels, group))
        if mean.shape != buffer.shape:
            raise ValueError(
                f"a hook's mean must have its bucket's shape, {tuple(buffer.shape)}, got {tuple(mean.shape)}. "
                "HINT: return the mean over the ranks of the whole buffer"
            )
        self._look(mean)
        return (mean if scale == 1.0 else mean.float() * scale).to(buffer.dtype)

    def owned(self, bucket: Bucket, bounds: Sequence[int]) -> Shard:
        """The mean of this rank's shard alone ([Note: push and pull] in compressor.py), NaN where `mean` would be."""
        assert isinstance(self.state, Compressor)
        self._begin(bucket.names)
        scale = self._scale()
        given = bucket.buffer if scale == 1.0 else bucket.buffer.float() / scale
        shard = push(self.state, Bucket(given, bucket.names, bucket.numels, bucket.group), bounds)
        if shard is None:
            self._overflowed = True
            rank = dist.get_rank(bucket.group)
            start, stop = bounds[rank], bounds[rank + 1]
            return Shard(start, stop, torch.full((stop - start,), float("nan"), device=bucket.buffer.device))
        return shard if scale == 1.0 else Shard(shard.start, shard.stop, shard.values * scale)

    def settle(self) -> None:
        """End a pass after which the engine has stepped: before the state is read."""
        if self._open and (self._step_of is None or self._step_of() != self._number):
            self._finish()

    def forget(self) -> None:
        """Another state was loaded: no pass is open."""
        self._open, self._before, self._overflowed = False, None, False
        self._seen.clear()

    def _scale(self) -> float:
        return 1.0 if self._loss_scale is None else self._loss_scale()

    def _begin(self, names: Sequence[str]) -> None:
        if self._step_of is not None or not self._seen.isdisjoint(names):
            self.settle()
        if not self._open:
            self._open = True
            self._number = 0 if self._step_of is None else self._step_of()
            if self._loss_scale is not None and isinstance(self.state, Compressor):
                self._before = self.state.residuals.snapshot()
        self._seen.update(names)

    def _look(self, mean: Tensor) -> None:
        if self._before is not None and not bool(torch.isfinite(mean).all()):
            self._overflowed = True

    def _finish(self) -> None:
        if isinstance(self.state, Compressor):
            if self._overflowed and self._before is not None:
                self.state.residuals.restore(self._before)
            else:
                self.state.next_step()
        self.forget()
