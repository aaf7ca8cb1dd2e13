"""What the parts of a run share."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_wsi.bags.bag import FailureLog
from ds_wsi.bags.cohort import Cohort
from ds_wsi.bags.step_layout import StepLayout
from ds_wsi.engines.accelerator.engine import (
    Accelerator,
    CommHandle,
)
from ds_wsi.models import ModelConfig, SlideModel
from ds_wsi.runtime.forwards import Handle
from ds_wsi.stacking.host_tiles import HostStacks
from ds_wsi.tile_parallel import TileMesh
from ds_wsi.tile_parallel.shard import SharedForward
from ds_wsi.training.optim import WeightAverage
from ds_wsi.training.saver import Saver
from ds_wsi.training.settings import TrainSettings


@dataclass
class Progress:
    """Where a run stands: all of it is in the checkpoint's state.json."""

    epoch: int = 0
    step_in_epoch: int = 0
    global_step: int = 0
    loss_sum: float = 0.0
    bags_seen: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None
    pending: bool = False  # the last finished epoch is not validated yet
    skipped_steps: int = 0  # in which half precision overflowed, and nothing was changed


@dataclass
class Run:
    """What the parts of a run share."""

    settings: TrainSettings
    accelerator: Accelerator
    output_dir: Path
    cohort: Cohort
    config: ModelConfig
    module: SlideModel
    model: nn.Module
    optimizer: Any
    failures: FailureLog
    progress: Progress
    mesh: TileMesh
    sharing: Handle[SharedForward | None]
    stacks: HostStacks
    reads_host_tiles: bool  # the encoder takes stacks that lie on the host, and reads chunks of them
    comm: CommHandle | None = None
    average: WeightAverage | None = None
    checkpoint: Path | None = None  # to go on from
    epoch_seconds: float | None = None  # that the last epoch trained, in this start
    made_of: dict[str, Any] | None = None  # see `same_run.fingerprint`
    started: float = field(default_factory=time.perf_counter)  # of this start
    seconds_before: float = 0.0  # of earlier starts, up to the checkpoint of each
    starts: int = 1
    saved: float = field(default_factory=time.perf_counter)  # when the last checkpoint was written
    saver: Saver = field(default_factory=Saver)  # of checkpoints
    save_is_due: bool = False  # by the time since then, as the main process has it: the same on all ranks
    stop_is_due: bool = False  # a rank was asked to end, or the time is over: the same on all ranks

    @property
    def device(self) -> torch.device:
        """Where tiles and model are."""
        return self.accelerator.device

    @property
    def has_own_engine(self) -> bool:
        """Whether DeepSpeed, and not torch alone, sums gradients and steps."""
        return self.accelerator.state.deepspeed_plugin is not None

    @property
    def step_layout(self) -> StepLayout:
        """The size of a step: how many bags each group of ranks that share them trains on."""
        return self.settings.step_layout(self.mesh.slide_size)

    @property
    def seconds(self) -> float:
        """Of all starts together, until now."""
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def training_tiles(self) -> list[int]:
        """Tiles of each training slide that one rank takes at a time."""
        wanted = self.settings.policies.reading.tiles_per_slide
        lengths = [self.cohort.lengths[row] for row in self.cohort.rows("train")]
        return [-(-min(length, wanted or length) // self.mesh.tile_size) for length in lengths]
