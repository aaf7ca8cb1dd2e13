"""End-to-end training of whole-slide-image models: tile encoder and slide aggregator together.

The public names; each is documented where it is defined.
"""

from ds_wsi.bags.cohort import Cohort, load_cohort
from ds_wsi.bags.manifest import Manifest, ManifestError, read_manifest
from ds_wsi.models import SlideModel, SlideOutput, build_aggregator, build_encoder, load_model
from ds_wsi.partition import PartitionPlan, PartitionPolicy, partition_layers, plan_partition
from ds_wsi.slides import Slide, SlideError, TileGrid, TilingPolicy, tile_slide
from ds_wsi.stacking import StackedBags, stack_bags
from ds_wsi.tile_parallel import TileParallelPolicy, shard_tiles, stream_bag, tile_mesh

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
    "build_aggregator",
    "build_encoder",
    "load_cohort",
    "load_model",
    "partition_layers",
    "plan_partition",
    "read_manifest",
    "shard_tiles",
    "stack_bags",
    "stream_bag",
    "tile_mesh",
    "tile_slide",
]
