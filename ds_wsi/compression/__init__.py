"""Gradient compression: top-k with error feedback, its wire format, and the exchanges between ranks.

`hook(state, bucket)` returns the mean of a bucket over the ranks; `push` and `pull_weights` are the two ways apart.
"""

from typing import TYPE_CHECKING

from ds_wsi.runtime.lazy import lazily

if TYPE_CHECKING:
    from ds_wsi.compression.compressor import Compressor, Shard, fold_states, hook, pull_weights, push
    from ds_wsi.compression.meter import ByteCount, target_ratio
    from ds_wsi.compression.policy import DMGC, Cast, TopK
    from ds_wsi.compression.route import Bucket, bounds_of, topology_of
    from ds_wsi.compression.schedule import KeepSchedule
    from ds_wsi.compression.wire import WireError

__all__ = [
    "DMGC",
    "Bucket",
    "ByteCount",
    "Cast",
    "Compressor",
    "KeepSchedule",
    "Shard",
    "TopK",
    "WireError",
    "bounds_of",
    "fold_states",
    "hook",
    "pull_weights",
    "push",
    "target_ratio",
    "topology_of",
]

# Help pages read the policies alone.
__getattr__ = lazily(
    __name__,
    {
        "ds_wsi.compression.compressor": (
            "Compressor",
            "Shard",
            "fold_states",
            "hook",
            "pull_weights",
            "push",
        ),
        "ds_wsi.compression.meter": (
            "ByteCount",
            "target_ratio",
        ),
        "ds_wsi.compression.policy": (
            "DMGC",
            "Cast",
            "TopK",
        ),
        "ds_wsi.compression.route": (
            "Bucket",
            "bounds_of",
            "topology_of",
        ),
        "ds_wsi.compression.schedule": ("KeepSchedule",),
        "ds_wsi.compression.wire": ("WireError",),
    },
)
