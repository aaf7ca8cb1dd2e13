"""Partitioned layers: exact training of activations larger than the device."""

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
