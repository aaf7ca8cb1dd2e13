"""End-to-end training of whole-slide-image models: tile encoder and slide aggregator together.

The public names; each is documented where it is defined.
"""

from ds_wsi.bags.cohort import Cohort, load_cohort
from ds_wsi.bags.manifest import Manifest, ManifestError, read_manifest
from ds_wsi.models import SlideModel, SlideOutput, build_aggregator, build_encoder, load_model
from ds_wsi.partition import PartitionPlan, PartitionPolicy, partition_layers, plan_partition
from ds_wsi.slides import Slide, SlideError, TileGrid, TilingPolicy, tile_slide
from ds_wsi.stacking import StackedBags, stack_bags

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
    "TilingPolicy",
    "build_aggregator",
    "build_encoder",
    "load_cohort",
    "load_model",
    "partition_layers",
    "plan_partition",
    "read_manifest",
    "stack_bags",
    "tile_slide",
]
