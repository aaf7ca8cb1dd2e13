"""Partitioned layers: exact training of activations larger than the device.

    policy, module   what a user asks; the module as it comes: arguments, outputs, hooks, what stands around its call
    graph            the module as a graph of operations, cut into segments
    execution        a call: forward and backward, segment by segment, chunk by chunk; host memory
    planning         which mode and chunk size each segment has
    checking         whether a partition gives what the module gives
    forward          the forward of a partitioned module
    apply, report    `partition_layers`, `check_partition`

Each line imports from those above it alone.
"""

from typing import TYPE_CHECKING

from ds_wsi.runtime.lazy import lazily

if TYPE_CHECKING:
    from ds_wsi.partition.apply import partition_layers
    from ds_wsi.partition.planning.plan import PartitionPlan, SegmentPlan
    from ds_wsi.partition.planning.search import plan_partition
    from ds_wsi.partition.policy import PartitionPolicy
    from ds_wsi.partition.report import PartitionReport, check_partition
    from ds_wsi.runtime.forwards import Handle

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
        "ds_wsi.partition.apply": ("partition_layers",),
        "ds_wsi.partition.planning.plan": (
            "PartitionPlan",
            "SegmentPlan",
        ),
        "ds_wsi.partition.planning.search": ("plan_partition",),
        "ds_wsi.partition.policy": ("PartitionPolicy",),
        "ds_wsi.partition.report": (
            "PartitionReport",
            "check_partition",
        ),
        "ds_wsi.runtime.forwards": ("Handle",),
    },
)
