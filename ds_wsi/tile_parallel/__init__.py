"""One bag across ranks, with the gradients of one process.

Source: Campanella et al., "Beyond Multiple Instance Learning: Full Resolution All-In-Memory End-To-End Pathology Slide
Modeling", arXiv 2403.04865.
"""

from typing import TYPE_CHECKING

from ds_wsi.runtime.lazy import lazily

if TYPE_CHECKING:
    from ds_wsi.tile_parallel.mesh import TileMesh, tile_mesh
    from ds_wsi.tile_parallel.policy import TileParallelPolicy
    from ds_wsi.tile_parallel.shard import shard_tiles
    from ds_wsi.tile_parallel.stream import stream_bag

__all__ = ["TileMesh", "TileParallelPolicy", "shard_tiles", "stream_bag", "tile_mesh"]

# Help pages read the policies alone.
__getattr__ = lazily(
    __name__,
    {
        "ds_wsi.tile_parallel.mesh": (
            "TileMesh",
            "tile_mesh",
        ),
        "ds_wsi.tile_parallel.policy": ("TileParallelPolicy",),
        "ds_wsi.tile_parallel.shard": ("shard_tiles",),
        "ds_wsi.tile_parallel.stream": ("stream_bag",),
    },
)
