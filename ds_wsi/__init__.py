"""End-to-end training of whole-slide-image models: tile encoder and slide aggregator together.

The public names; each is documented where it is defined.
"""

from typing import TYPE_CHECKING

from ds_wsi.runtime.lazy import lazily
from ds_wsi.runtime.moved import find_moved_modules

if TYPE_CHECKING:
    from ds_wsi.bags.cohort import Cohort, load_cohort
    from ds_wsi.bags.manifest import Manifest, ManifestError, read_manifest
    from ds_wsi.commands.functions import predict, train
    from ds_wsi.engines.accelerator.engine import pool_statistics
    from ds_wsi.engines.comm_hooks.register import attach, register_comm_hook
    from ds_wsi.engines.hf.models import SlideCollator, SlideModelConfig, SlideModelForSlideClassification
    from ds_wsi.engines.hf.trainer import CommHookCallback, SlideTrainer, apply_policies
    from ds_wsi.engines.initialize import initialize
    from ds_wsi.engines.machine.cpu import trainer_arguments
    from ds_wsi.engines.machine.nvme import NvmeSpill
    from ds_wsi.models import SlideModel, SlideOutput, build_aggregator, build_encoder, load_model
    from ds_wsi.partition import PartitionPlan, PartitionPolicy, check_partition, partition_layers, plan_partition
    from ds_wsi.slides import Slide, SlideError, TileGrid, TilingPolicy, tile_slide
    from ds_wsi.stacking import StackedBags, stack_bags
    from ds_wsi.tile_parallel import TileParallelPolicy, shard_tiles, stream_bag, tile_mesh

__all__ = [
    "Cohort",
    "CommHookCallback",
    "Manifest",
    "ManifestError",
    "NvmeSpill",
    "PartitionPlan",
    "PartitionPolicy",
    "Slide",
    "SlideCollator",
    "SlideError",
    "SlideModel",
    "SlideModelConfig",
    "SlideModelForSlideClassification",
    "SlideOutput",
    "SlideTrainer",
    "StackedBags",
    "TileGrid",
    "TileParallelPolicy",
    "TilingPolicy",
    "apply_policies",
    "attach",
    "build_aggregator",
    "build_encoder",
    "check_partition",
    "initialize",
    "load_cohort",
    "load_model",
    "partition_layers",
    "plan_partition",
    "pool_statistics",
    "predict",
    "read_manifest",
    "register_comm_hook",
    "shard_tiles",
    "stack_bags",
    "stream_bag",
    "tile_mesh",
    "tile_slide",
    "train",
    "trainer_arguments",
]

find_moved_modules()

# `ds-wsi --help` needs none of them, and who reads slides no engine.
__getattr__ = lazily(
    __name__,
    {
        "ds_wsi.bags.cohort": (
            "Cohort",
            "load_cohort",
        ),
        "ds_wsi.bags.manifest": (
            "Manifest",
            "ManifestError",
            "read_manifest",
        ),
        "ds_wsi.commands.functions": (
            "predict",
            "train",
        ),
        "ds_wsi.engines.accelerator.engine": ("pool_statistics",),
        "ds_wsi.engines.comm_hooks.register": (
            "attach",
            "register_comm_hook",
        ),
        "ds_wsi.engines.hf.models": (
            "SlideCollator",
            "SlideModelConfig",
            "SlideModelForSlideClassification",
        ),
        "ds_wsi.engines.hf.trainer": (
            "CommHookCallback",
            "SlideTrainer",
            "apply_policies",
        ),
        "ds_wsi.engines.initialize": ("initialize",),
        "ds_wsi.engines.machine.cpu": ("trainer_arguments",),
        "ds_wsi.engines.machine.nvme": ("NvmeSpill",),
        "ds_wsi.models": (
            "SlideModel",
            "SlideOutput",
            "build_aggregator",
            "build_encoder",
            "load_model",
        ),
        "ds_wsi.partition": (
            "PartitionPlan",
            "PartitionPolicy",
            "check_partition",
            "partition_layers",
            "plan_partition",
        ),
        "ds_wsi.slides": (
            "Slide",
            "SlideError",
            "TileGrid",
            "TilingPolicy",
            "tile_slide",
        ),
        "ds_wsi.stacking": (
            "StackedBags",
            "stack_bags",
        ),
        "ds_wsi.tile_parallel": (
            "TileParallelPolicy",
            "shard_tiles",
            "stream_bag",
            "tile_mesh",
        ),
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
