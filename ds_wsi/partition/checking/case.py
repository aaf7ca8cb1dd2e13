"""What one check of a partition is about."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.partition.module.arguments import Arguments
from ds_wsi.partition.module.identity import module_key
from ds_wsi.partition.planning.plan import PartitionPlan, SegmentPlan
from ds_wsi.runtime.numerics import autocast_dtype, memory_layout


@dataclass(frozen=True)
class Case:
    """What one check is about.

    Args:
        module: the partitioned module.
        original: the module's own forward.
        partitioned: makes the module's forward of a plan.
        plan: the call's plan.
        arguments: the call's arguments beside the tiles.
        device: the device that computes.
        backward: whether the call saves for one.
        input_grad: whether a gradient reaches the tiles.
    """

    module: nn.Module
    original: Callable[..., Any]
    partitioned: Callable[[PartitionPlan], Callable[..., Any]]
    plan: PartitionPlan
    arguments: Arguments
    device: torch.device
    backward: bool
    input_grad: bool

    @property
    def owner(self) -> str:
        """The module's class."""
        return type(self.module).__name__

    @property
    def by_tile(self) -> bool:
        """Whether chunks are tiles."""
        return self.plan.axis == "batch"

    @property
    def modes(self) -> str:
        """The modes of the plan's segments, each once."""
        return ", ".join(dict.fromkeys(part.mode for part in self.plan.segments))

    def key(self, tiles: Tensor) -> int:
        """A number that is equal for calls of which one check is enough."""
        kind = (
            str(memory_layout(tiles)),
            str(tiles.dtype),
            str(autocast_dtype(self.device)),
            str(self.device),
            tuple(tiles.shape[1:]),
        )
        modes = self.plan.axis, *sorted({part.mode for part in self.plan.segments})
        return hash(
            (
                id(self.original),
                module_key(self.module),
                kind,
                modes,
                self.arguments.key,
                self.backward,
                self.input_grad,
            )
        )

    def with_chunks(self, size: int, tiles: Tensor, *, lean: bool) -> Callable[..., Any]:
        """The forward of a trial on these tiles: the plan's segments and modes, other chunks.

        Args:
            size: tiles, or rows, per chunk.
            tiles: the trial's tiles.
            lean: "recompute" becomes "lean".
        """

        def changed(part: SegmentPlan) -> SegmentPlan:
            mode = "lean" if lean and part.mode == "recompute" else part.mode
            return SegmentPlan(part.last, mode, size, part.host_input)

        segments = tuple(map(changed, self.plan.segments))
        return self.partitioned(PartitionPlan(segments, self.plan.axis, self.plan.bn_population, tuple(tiles.shape)))
