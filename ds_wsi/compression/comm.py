"""The "compression" section: which hook a run's gradients go through, and its policy."""

from dataclasses import dataclass
from typing import Any

import torch

from ds_wsi.compression.compressor import Compressor
from ds_wsi.compression.policy import DMGC, Cast, TopK
from ds_wsi.compression.schedule import KeepSchedule

HOOK_NAMES = ("none", "auto", "allreduce", "fp16", "bf16", "topk", "powersgd", "dmgc")
CASTS = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class CommPolicy:
    """How gradients are communicated. Off by default: compression pays only where the link is slow.

    Args:
        hook: "none", a hook's name, or "auto": dmgc, bf16 or none, whichever the cost model finds fastest.
        keep, values, momentum, dense_below: of `TopK` and `DMGC`.
        clip_norm: of a rank's gradient before the residual is added; 0 clips nothing.
        dense_steps, stage_steps: of the warm-up (`KeepSchedule`); powersgd starts after `dense_steps` too.
        topology, pull: of `DMGC`.
        pull_keep: of `DMGC`; 0: as `keep`.
        approx_rank: of powersgd's matrices.
    """

    hook: str = "none"
    keep: float = 0.01
    values: str = "fp32"
    momentum: float = 0.0
    clip_norm: float = 0.0
    dense_below: int = 0
    dense_steps: int = 0
    stage_steps: int = 0
    topology: str = "sharded"
    pull: str = "auto"
    pull_keep: float = 0.0
    approx_rank: int = 4

    def __post_init__(self) -> None:
        """Refuse what no hook takes."""
        if self.hook not in HOOK_NAMES:
            raise ValueError(f"hook must be one of {', '.join(HOOK_NAMES)}, got {self.hook!r}. HINT: auto")
        if self.approx_rank < 1:
            raise ValueError(f"approx_rank must be at least 1, got {self.approx_rank}. HINT: 1 to 4")
        self.build("dmgc")

    def build(self, hook: str) -> Compressor | None:
        """The state of a named hook; None for those that need none of ours."""
        if hook in CASTS:
            return Compressor(Cast(CASTS[hook]))
        if hook not in ("topk", "dmgc"):
            return None
        common: dict[str, Any] = {
            "keep": self.keep,
            "values": self.values,
            "momentum": self.momentum,
            "clip_norm": self.clip_norm or None,
            "dense_below": self.dense_below,
            "schedule": KeepSchedule(dense_steps=self.dense_steps, stage_steps=self.stage_steps),
        }
        if hook == "topk":
            return Compressor(TopK(**common))
        return Compressor(DMGC(**common, topology=self.topology, pull=self.pull, pull_keep=self.pull_keep or None))
