"""Partitioned layers: exact training of activations larger than the device."""

from typing import TYPE_CHECKING

from ds_wsi.runtime.lazy import lazily

if TYPE_CHECKING:
    from ds_wsi.partition.apply import Handle, partition_layers
    from ds_wsi.partition.plan import PartitionPlan, SegmentPlan
    from ds_wsi.partition.planner import plan_partition
    from ds_wsi.partition.policy import PartitionPolicy
    from ds_wsi.partition.report import PartitionReport, check_partition

__all__ = [
    "Handle",
    "PartitionPlan",
    "PartitionPolicy",
    "PartitionReport",
    "SegmentPlan",
    "check_partition",
    "partition_layers",
    "plan_partition",
]

# The policy, for options, needs none of what partitions, nor torch's compiler.
__getattr__ = lazily(
    __name__,
    {
        "ds_wsi.partition.apply": (
            "Handle",
            "partition_layers",
        ),
        "ds_wsi.partition.plan": (
            "PartitionPlan",
            "SegmentPlan",
        ),
        "ds_wsi.partition.planner": ("plan_partition",),
        "ds_wsi.partition.policy": ("PartitionPolicy",),
        "ds_wsi.partition.report": (
            "PartitionReport",
            "check_partition",
        ),
    },
)
