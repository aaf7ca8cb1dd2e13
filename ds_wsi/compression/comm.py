"""The "compression" section: which hook a run's gradients go through, and its policy."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ds_wsi.runtime.setting import Decides, setting

if TYPE_CHECKING:
    from ds_wsi.compression.compressor import Compressor

HOOK_NAMES = ("none", "auto", "allreduce", "fp16", "bf16", "topk", "powersgd", "dmgc")
_SPARSE = ("topk", "dmgc", "auto")


@dataclass(frozen=True)
class CommPolicy:
    """How gradients are communicated. Off by default: compression pays only where the link is slow.

    Args:
        hook: "none", a hook's name, or "auto": dmgc, bf16 or none, whichever the cost model finds fastest.
        keep, values, momentum, dense_below: see `TopK` and `DMGC`.
        clip_norm: the norm that a rank's gradient is clipped to before the residual is added; 0 clips nothing.
        dense_steps, stage_steps: steps of the warm-up (`KeepSchedule`); powersgd starts after `dense_steps` too.
        topology, pull: see `DMGC`.
        pull_keep: see `DMGC`; 0: as `keep`.
        approx_rank: rank of powersgd's matrices.
    """

    hook: str = setting(
        "none",
        "how gradients go between processes: whole, or compressed (topk, dmgc); auto measures the link",
        Decides.RESOLVED,
        resolved="comm_hook",
        option="comm_hook",
        kind=HOOK_NAMES,
    )
    keep: float = setting(
        0.01,
        "share of a gradient's entries, 0 to 1, that --comm_hook topk and dmgc send",
        Decides.RESULT,
        option="comm_keep",
        needs=("hook", _SPARSE),
    )
    values: str = setting(
        "fp32",
        "how sent values are written: whole (fp32), or as signs with scales",
        Decides.RESULT,
        needs=("hook", _SPARSE),
    )
    momentum: float = setting(
        0.0,
        "momentum of a process's own gradient before it is compressed (DGC), 0 to 1",
        Decides.RESULT,
        needs=("hook", _SPARSE),
    )
    clip_norm: float = setting(
        0.0,
        "largest norm of a process's gradient before the residual is added; 0 clips nothing",
        Decides.RESULT,
        needs=("hook", _SPARSE),
    )
    dense_below: int = setting(
        0, "number of entries below which a gradient is sent whole", Decides.RESULT, needs=("hook", _SPARSE)
    )
    dense_steps: int = setting(
        0,
        "number of first optimizer steps in which gradients are sent whole",
        Decides.RESULT,
        needs=("hook", (*_SPARSE, "powersgd")),
    )
    stage_steps: int = setting(
        0,
        "number of optimizer steps of each stage of the warm-up, in which the share that is sent falls",
        Decides.RESULT,
        needs=("hook", _SPARSE),
    )
    topology: str = setting(
        "sharded",
        "who merges the gradients: every process a shard of them, or one server",
        Decides.RESULT,
        needs=("hook", ("dmgc", "auto")),
    )
    pull: str = setting(
        "auto",
        "how the merged gradient comes back: whole, or compressed; auto takes the smaller",
        Decides.RESULT,
        needs=("hook", ("dmgc", "auto")),
    )
    pull_keep: float = setting(
        0.0,
        "share of the merged gradient's entries that come back; 0 is --comm_keep",
        Decides.RESULT,
        needs=("hook", ("dmgc", "auto")),
    )
    approx_rank: int = setting(4, "rank of powersgd's matrices", Decides.RESULT, needs=("hook", ("powersgd",)))

    def __post_init__(self) -> None:
        """Refuse what no hook takes."""
        if self.hook not in HOOK_NAMES:
            raise ValueError(f"hook must be one of {', '.join(HOOK_NAMES)}, got {self.hook!r}. HINT: auto")
        if self.approx_rank < 1:
            raise ValueError(f"approx_rank must be at least 1, got {self.approx_rank}. HINT: 1 to 4")
        self.build("dmgc")

    def build(self, hook: str) -> "Compressor | None":
        """The state of a named hook; None for those that need none of ours."""
        import torch  # here, because help pages need none

        from ds_wsi.compression.compressor import Compressor
        from ds_wsi.compression.policy import DMGC, Cast, TopK
        from ds_wsi.compression.schedule import KeepSchedule

        casts = {"fp16": torch.float16, "bf16": torch.bfloat16}
        if hook in casts:
            return Compressor(Cast(casts[hook]))
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
