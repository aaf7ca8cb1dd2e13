"""What a user says of compression: small frozen policies."""

from dataclasses import dataclass, field

import torch

from ds_wsi.compression.schedule import KeepSchedule
from ds_wsi.compression.wire import VALUE_ENCODINGS

TOPOLOGIES = ("all_gather", "sharded", "server")
PULLS = ("auto", "weights", "means")


@dataclass(frozen=True)
class TopK:
    """Each rank sends the largest entries of its gradient to all others, and keeps the rest for later.

    What a rank receives grows with the number of ranks, in a schedule's dense steps to W-1 gradients: for more than a
    few ranks take `DMGC`.

    Attributes:
        keep: share of a bucket's entries that is sent, in (0, 1].
        values: how a value is sent: "fp32", "fp16", "bf16". What rounding takes is kept for later too.
        momentum: the momentum of DGC's correction (the optimizer must then have none); 0: no correction.
        clip_norm: the norm that a bucket's gradient is clipped to before the residual is added; None: no clipping.
        dense_below: parameters with fewer entries (biases, norms) are sent whole; 0: one selection over the bucket.
        schedule: the warm-up.
    """

    keep: float = 0.01
    values: str = "fp32"
    momentum: float = 0.0
    clip_norm: float | None = None
    dense_below: int = 0
    schedule: KeepSchedule = field(default_factory=KeepSchedule)

    def __post_init__(self) -> None:
        _check_keep("keep", self.keep)
        if self.values not in VALUE_ENCODINGS:
            raise ValueError(f"values must be one of {', '.join(VALUE_ENCODINGS)}, got {self.values!r}. HINT: fp32")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}. HINT: 0 leaves the correction out")
        if self.clip_norm is not None and not 0 < self.clip_norm < float("inf"):
            raise ValueError(f"clip_norm must be positive, got {self.clip_norm}. HINT: None leaves clipping out")
        if self.dense_below < 0:
            raise ValueError(f"dense_below must be at least 0, got {self.dense_below}. HINT: 0 sends none whole")

    def keep_at(self, step: int) -> float:
        """Share that is pushed at a step."""
        return self.schedule.keep_at(step, self.keep)


@dataclass(frozen=True)
class DMGC(TopK):
    """Both ways compressed (Wu et al., ICML 2025, Algorithm 1): gradients to owners, changes of the weights back.

    Attributes:
        topology: "sharded": each rank owns an equal part (the one to recommend); "server": rank 0 owns all, the paper's
            star; "all_gather": as `TopK`, without a way back.
        pull_keep: share of its entries that an owner sends back; None: as `keep`. The mean of W selections has more
            entries than one of them: twice `keep` takes fewer steps.
        pull: what owners send back. "weights": the changes of their weights, where the engine's optimizer is sharded
            (ZeRO 1 and 2). "means": their means, for optimizers that every rank has whole. "auto": weights where they
            can be.
    """

    topology: str = "sharded"
    pull_keep: float | None = None
    pull: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topology not in TOPOLOGIES:
            raise ValueError(f"topology must be one of {', '.join(TOPOLOGIES)}, got {self.topology!r}. HINT: sharded")
        if self.pull_keep is not None:
            _check_keep("pull_keep", self.pull_keep)
        if self.pull not in PULLS:
            raise ValueError(f"pull must be one of {', '.join(PULLS)}, got {self.pull!r}. HINT: auto")

    def pull_keep_at(self, step: int) -> float:
        """Share that is pulled at a step."""
        return self.schedule.keep_at(step, self.keep if self.pull_keep is None else self.pull_keep)


@dataclass(frozen=True)
class Cast:
    """The whole gradient in 16 bits; sums are float32.

    Attributes:
        dtype: torch.float16 or torch.bfloat16; torch.float32 sends the gradient as it is, the dense baseline.
    """

    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.dtype not in VALUE_ENCODINGS.values():
            raise ValueError(f"dtype must be float16, bfloat16 or float32, got {self.dtype}. HINT: torch.bfloat16")


def _check_keep(name: str, keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {keep}. HINT: 0.01 sends 1 % of the entries")
