"""Error feedback: what was not sent is kept, by parameter name, and added to what comes next.

Wu et al. (ICML 2025, Algorithm 1): c = G + residual; send C(c); residual = c - C(c). The printed `residual <- 0` inside
the training loop is not followed: it would disable the feedback. What is subtracted is what a receiver decodes, so that
the rounding of fp16 values comes back too.

With a momentum, Deep Gradient Compression's correction (arXiv 1712.01887, section 3.1 and Algorithm 4): the velocity
u <- momentum * u + g is accumulated in place of g, v <- v + u, v is what is compressed, and both are cleared where sent
(momentum factor masking: else old momentum would carry on what has been late once already). A parameter that is sent
whole is never late, so its velocity stays: at 100 % this is SGD with momentum. The optimizer must then have no momentum
of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate as running_sum

import torch
from torch import Tensor

_RESIDUAL, _VELOCITY = "residual.", "velocity."


@dataclass(frozen=True)
class Pending:
    """A step's sum of residual and gradient, which becomes the residual when it is committed.

    Attributes:
        names: the tensors, in the order in which they lie in the flat buffers.
        offsets: where each begins, and the end.
        corrected: c (or v), flat [d] float32.
        velocity: u, flat [d] float32; None without momentum.
    """

    names: tuple[str, ...]
    offsets: tuple[int, ...]
    corrected: Tensor
    velocity: Tensor | None


class Residuals:
    """The residual of each parameter of one rank.

    A step is `accumulate`, then `commit`. A step that is not committed (overflow) leaves no trace.
    Residuals are found by name: the buckets they arrive in may differ from step to step (DDP rebuilds its own after the
    first).
    """

    def __init__(self, momentum: float = 0.0) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.momentum = momentum
        self._residual: dict[str, Tensor] = {}
        self._velocity: dict[str, Tensor] = {}

    def owes(self, names: Sequence[str]) -> bool:
        """Whether anything of these parameters was kept back, or has been in a state that was loaded."""
        return any(name in self._residual for name in names)

    def accumulate(
        self, names: Sequence[str], numels: Sequence[int], gradient: Tensor, *, scale: float | Tensor = 1.0
    ) -> Pending:
        """Add `scale` times a flat gradient to the residuals of its parameters; changes neither.

        Args:
            gradient: flat [sum of numels]; the parameters' gradients in the order of `names`.
            scale: a factor of the gradient (`clip_scale`).

        Raises:
            ValueError: sizes that do not add up, or another size than the parameter had before.
        """
        offsets = tuple(running_sum(numels, initial=0))
        if len(names) != len(numels) or gradient.dim() != 1 or gradient.numel() != offsets[-1]:
            raise ValueError(
                f"a bucket must hold its parameters one after another, {offsets[-1]} values of {len(names)} names, "
                f"got {tuple(gradient.shape)} of {len(numels)} sizes"
            )
        if len(set(names)) != len(names):
            raise ValueError("a bucket's parameters must have names of their own")
        gradient = gradient.detach().float()
        velocity = None
        if self.momentum > 0:
            gradient = velocity = self._add(self._velocity, names, offsets, gradient, scale, self.momentum)
            scale = 1.0
        corrected = self._add(self._residual, names, offsets, gradient, scale, 1.0)
        return Pending(tuple(names), offsets, corrected, velocity)

    def _add(
        self,
        kept: dict[str, Tensor],
        names: Sequence[str],
        offsets: Sequence[int],
        gradient: Tensor,
        scale: float | Tensor,
        factor: float,
    ) -> Tensor:
        """Flat factor * kept + scale * gradient; of a name not seen before, scale * gradient."""
        total = torch.empty_like(gradient)
        scaled = gradient if isinstance(scale, float) and scale == 1.0 else gradient * scale
        for name, start, stop in zip(names, offsets, offsets[1:]):
            if name not in kept:
                total[start:stop] = scaled[start:stop]
            elif kept[name].numel() != stop - start:
                raise ValueError(
                    f"a parameter must keep its size, got {stop - start} values after {kept[name].numel()} ({name}). "
                    "HINT: start with new residuals where the model or its shards change"
                )
            else:
                torch.add(scaled[start:stop], kept[name], alpha=factor, out=total[start:stop])
        return total

    def commit(
        self, pending: Pending, indices: Tensor | None, sent: Tensor, *, whole: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Keep what was not sent.

        Takes over `pending`'s tensors, changing them in place: they are the residuals from here on.

        Args:
            indices: [n] int64 into the flat buffer, each once; None: all of it.
            sent: [n] float32, what a receiver decodes at them.
            whole: (start, stop) of what is sent whole at every step, within `indices`: its velocity is not masked.
        """
        corrected, velocity = pending.corrected, pending.velocity
        if indices is None:
            corrected -= sent
        else:
            corrected[indices] -= sent
        if velocity is not None and indices is not None:
            unmasked = [velocity[start:stop].clone() for start, stop in whole]
            velocity[indices] = 0
            for (start, stop), part in zip(whole, unmasked, strict=True):
                velocity[start:stop] = part
        for name, start, stop in zip(pending.names, pending.offsets, pending.offsets[1:]):
            self._residual[name] = corrected[start:stop]
            if velocity is not None:
                self._velocity[name] = velocity[start:stop]

    def owe(self, names: Sequence[str], numels: Sequence[int], start: int, values: Tensor) -> None:
        """Add flat float32 `values` to the residuals from entry `start` of a committed bucket on, in place."""
        stop = start + values.numel()
        ends = list(running_sum(numels, initial=0))
        for name, begin, end in zip(names, ends, ends[1:]):
            first, last = max(begin, start), min(end, stop)
            if first < last:
                self._residual[name][first - begin : last - begin] += values[first - start : last - start]

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What `restore` goes back to. No copies: a commit puts other tensors in the place of the old ones."""
        return dict(self._residual), dict(self._velocity)

    def restore(self, snapshot: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
        """Undo all commits since the snapshot."""
        self._residual, self._velocity = dict(snapshot[0]), dict(snapshot[1])

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all tensors, one storage each (as safetensors asks), under `residual.NAME` and `velocity.NAME`."""
        tensors = {_RESIDUAL + name: tensor.clone() for name, tensor in self._residual.items()}
        return tensors | {_VELOCITY + name: tensor.clone() for name, tensor in self._velocity.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace all residuals by those of `state_dict`.

        Raises:
            ValueError: names or dtypes that `state_dict` does not write, or velocities without momentum or the reverse.
        """
        residual = _named(state, _RESIDUAL)
        velocity = _named(state, _VELOCITY)
        if unknown := sorted(set(state) - {_RESIDUAL + n for n in residual} - {_VELOCITY + n for n in velocity}):
            raise ValueError(
                f"a state of residuals must hold flat float32 {_RESIDUAL}* and {_VELOCITY}*, got {unknown}"
            )
        if set(velocity) != (set(residual) if self.momentum > 0 else set()):
            raise ValueError(
                f"a state of residuals must be of the same kind of momentum, got {len(velocity)} velocities of "
                f"{len(residual)} residuals where momentum is {self.momentum}. HINT: resume with the run's settings"
            )
        self._residual, self._velocity = residual, velocity


def _named(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): tensor.clone()
        for key, tensor in state.items()
        if key.startswith(prefix) and tensor.dtype == torch.float32 and tensor.dim() == 1
    }


def fold(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The state for every rank of another world size: the mean of the old ranks' states, in rank order.

    Ranks average what they send, so the residuals of W ranks still owe the weights their mean; W' ranks that each hold
    this mean owe the same.

    Raises:
        ValueError: no state, or states of different parameters.
    """
    if not states or any(set(state) != set(states[0]) for state in states):
        raise ValueError(
            f"states to fold must be of the same parameters on every rank, got {len(states)} that differ. "
            "HINT: give the files of all ranks of one checkpoint"
        )
    totals = {key: tensor.clone() for key, tensor in states[0].items()}
    for state in states[1:]:
        for key, total in totals.items():
            total += state[key]
    return {key: total / len(states) for key, total in totals.items()}


def clip_scale(gradient: Tensor, max_norm: float, world_size: int) -> Tensor:
    """The factor that brings a rank's gradient to a norm of at most `max_norm` / sqrt(world size), a scalar tensor.

    Clipping comes before the residual is added, rank by rank: the sum of W independent gradients has sqrt(W) times
    the norm of one (DGC, section 3.2). Clipping after the mask would lose what it cuts off. Of a gradient that is not
    finite the scale makes NaN, which the selection finds.
    """
    norm = torch.linalg.vector_norm(gradient.detach().float())
    limit = max_norm / world_size**0.5
    return (limit / norm.clamp(min=limit)).where(norm.isfinite(), float("nan"))
