"""End-to-end training of whole-slide-image models: tile encoder and slide aggregator together.

The public names; each is documented where it is defined.
"""

from typing import TYPE_CHECKING, Any

from ds_wsi.bags.cohort import Cohort, load_cohort
from ds_wsi.bags.manifest import Manifest, ManifestError, read_manifest
from ds_wsi.models import SlideModel, SlideOutput, build_aggregator, build_encoder, load_model
from ds_wsi.partition import PartitionPlan, PartitionPolicy, check_partition, partition_layers, plan_partition
from ds_wsi.slides import Slide, SlideError, TileGrid, TilingPolicy, tile_slide
from ds_wsi.stacking import StackedBags, stack_bags
from ds_wsi.tile_parallel import TileParallelPolicy, shard_tiles, stream_bag, tile_mesh

if TYPE_CHECKING:
    from ds_wsi.engines.hooks import attach, initialize, register_comm_hook

# Their module imports the frameworks, which a user of the other names may not have, or not need yet.
_FROM_HOOKS = ("attach", "initialize", "register_comm_hook")

__all__ = [
    "Cohort",
    "Manifest",
    "ManifestError",
    "PartitionPlan",
    "PartitionPolicy",
    "Slide",
    "SlideError",
    "SlideModel",
    "SlideOutput",
    "StackedBags",
    "TileGrid",
    "TileParallelPolicy",
    "TilingPolicy",
    "attach",
    "build_aggregator",
    "build_encoder",
    "check_partition",
    "initialize",
    "load_cohort",
    "load_model",
    "partition_layers",
    "plan_partition",
    "read_manifest",
    "register_comm_hook",
    "shard_tiles",
    "stack_bags",
    "stream_bag",
    "tile_mesh",
    "tile_slide",
]


def __getattr__(name: str) -> Any:
    if name in _FROM_HOOKS:
        from ds_wsi.engines import hooks

        return getattr(hooks, name)
    raise AttributeError(f"module 'ds_wsi' has no attribute {name!r}")
