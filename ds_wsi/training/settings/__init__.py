"""A run's settings, grouped by the part of the system that they concern; option names are the HF Trainer's."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ds_wsi.bags.step_layout import StepLayout
from ds_wsi.config import DsWsiConfig
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.training.settings.data import DataSettings
from ds_wsi.training.settings.model import ModelSettings
from ds_wsi.training.settings.optim import OptimSettings
from ds_wsi.training.settings.run import RunSettings
from ds_wsi.training.settings.task import TaskSettings

if TYPE_CHECKING:
    from ds_wsi.bags.tile_budget import TileBudget

__all__ = ["DataSettings", "ModelSettings", "OptimSettings", "RunSettings", "TaskSettings", "TrainSettings"]


@dataclass(frozen=True)
class TrainSettings:
    """Everything a run is given; `policies` is the "ds_wsi" section of the DeepSpeed JSON."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    run: RunSettings = field(default_factory=RunSettings)
    policies: DsWsiConfig = field(default_factory=DsWsiConfig)
    task: TaskSettings = field(default_factory=TaskSettings)

    @property
    def tilings(self) -> tuple[TilingPolicy, ...]:
        """How slides are tiled, at each of --mpps; the finest first."""
        tiling = self.policies.tiling
        return tuple(replace(tiling, mpp=mpp) for mpp in self.data.mpps) or (tiling,)

    @property
    def tile_budget(self) -> "TileBudget":
        """The tiles of a bag that are trained on."""
        from ds_wsi.bags.tile_budget import TileBudget  # here, because help pages need no torch

        reading = self.policies.reading
        return TileBudget(reading.tiles_per_slide, reading.tiles_per_bag, self.data.scale_ratio)

    @property
    def micro_steps(self) -> int:
        """How many stacks a process divides its share of an optimizer step into."""
        return self.policies.stacking.virtual_workers or self.optim.gradient_accumulation_steps

    def step_layout(self, groups: int) -> StepLayout:
        """The size of a step.

        Args:
            groups: number of processes, or of groups of them that share bags.
        """
        stacking = self.policies.stacking
        return StepLayout(
            groups, self.optim.per_device_train_batch_size, self.micro_steps, stacking if stacking.deals else None
        )

    @property
    def encoder_factor(self) -> float:
        """The encoder's learning rate over the aggregator's; 1 where the encoder rests for good, or adapters learn."""
        if self.model.freeze_encoder or self.model.lora_rank:
            return 1.0
        return self.optim.encoder_factor(from_weights=self.model.has_weights)
