"""What is fixed of a run once it is prepared."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_wsi.bags.cohort import Cohort
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.bags.step_layout import StepLayout
from ds_wsi.bags.tile_budget import TileBudget
from ds_wsi.engines.accelerator.engine import (
    Accelerator,
    CommHandle,
)
from ds_wsi.models import ModelConfig, SlideModel
from ds_wsi.runtime.forwards import Handle
from ds_wsi.stacking.host_tiles import HostStacks
from ds_wsi.targets.several import AnyTask
from ds_wsi.tile_parallel import TileMesh
from ds_wsi.tile_parallel.shard import SharedForward
from ds_wsi.training.settings import TrainSettings
from ds_wsi.training.task import chosen_metric
from ds_wsi.training.teacher import Teacher


@dataclass(frozen=True, eq=False)
class RunContext:
    """What is fixed of a run once `prepare_run` has made it. What takes a context alone cannot move the run on.

    A field is never set again. The weights and the optimizer's moments behind `model` and `optimizer` change by a step;
    where the run stands beside them is in `run.Run`.

    Attributes:
        settings: the run's.
        accelerator: the engine.
        output_dir: the run's folder.
        cohort: the slides, or the files of features.
        config: the model's, as it is exported.
        module: the model itself.
        model: the same as the engine wraps it: what a step calls.
        optimizer: the optimizer as the engine wraps it.
        mesh: the processes that share bags, and those that have bags of their own.
        sharing: the model's forward where ranks share bags.
        stacks: page-locked memory in which stacks are laid.
        reads_host_tiles: whether the encoder takes stacks that lie on the host, and reads chunks of them.
        comm: the hook that sends gradients, or None.
        checkpoint: the one to go on from, or None.
        task: what slides are asked; None: their class.
        teacher: near whose features the encoder is held, or None.
        made_of: see `same_run.fingerprint`, which alone fills it, once.
    """

    settings: TrainSettings
    accelerator: Accelerator
    output_dir: Path
    cohort: Cohort
    config: ModelConfig
    module: SlideModel
    model: nn.Module
    optimizer: Any
    mesh: TileMesh
    sharing: Handle[SharedForward | None]
    stacks: HostStacks
    reads_host_tiles: bool
    comm: CommHandle | None = None
    checkpoint: Path | None = None
    task: AnyTask | None = None
    teacher: Teacher | None = None
    made_of: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where tiles and model are."""
        return self.accelerator.device

    @property
    def has_own_engine(self) -> bool:
        """Whether DeepSpeed, and not torch alone, sums gradients and steps."""
        return self.accelerator.state.deepspeed_plugin is not None

    @property
    def seed(self) -> int:
        """The seed of everything that the run draws."""
        return self.settings.run.seed

    @property
    def epochs(self) -> int:
        """The epochs that the run trains, where nothing stops it early."""
        return self.settings.optim.num_train_epochs

    @property
    def reading(self) -> ReadPolicy:
        """How tiles are read."""
        return self.settings.policies.reading

    @property
    def best_metric(self) -> str:
        """The key, in an epoch's entry, of the metric that chooses the epoch."""
        return f"eval_{chosen_metric(self.settings)}"

    @property
    def step_layout(self) -> StepLayout:
        """The size of a step: how many bags each group of ranks that share them trains on."""
        return self.settings.step_layout(self.mesh.slide_size)

    @property
    def tile_budget(self) -> TileBudget:
        """The tiles of a bag that are trained on."""
        return self.settings.tile_budget

    @property
    def training_tiles(self) -> list[int]:
        """Tiles of each training bag that one rank takes at a time."""
        taken = (self.tile_budget.taken(self.cohort.grids[row]) for row in self.cohort.rows("train"))
        return [-(-length // self.mesh.tile_size) for length in taken]
