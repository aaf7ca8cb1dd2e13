"""Ranks in two dimensions: `slide` groups take different bags, the ranks of one `tile` group share each of theirs."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class TileMesh:
    """This rank's place in the mesh; rank = slide_rank * tile_size + tile_rank.

    Attributes:
        group: the ranks that share a bag; None where it is one rank.
        tile_rank, tile_size: this rank's place in that group, and the group's size.
        slide_rank, slide_size: the group among the groups.
        mesh: torch's, dimensions ("slide", "tile"); None without a process group.
    """

    group: Any = None
    tile_rank: int = 0
    tile_size: int = 1
    slide_rank: int = 0
    slide_size: int = 1
    mesh: DeviceMesh | None = None


def tile_mesh(size: int, device_type: str = "cpu") -> TileMesh:
    """Arrange all ranks in groups of `size` that share bags. Collective: makes process groups.

    Args:
        size: ranks per tile group.
        device_type: "cpu" or "cuda", of the mesh.

    Raises:
        ValueError: `size` does not divide the number of ranks.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if size < 1 or world % size:
        divisors = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise ValueError(
            f"tile_parallel.size must divide the number of ranks, {world}, got {size}. HINT: one of {divisors}."
        )
    rank = dist.get_rank() if world > 1 else 0
    if size == 1:
        return TileMesh(slide_rank=rank, slide_size=world)
    mesh = init_device_mesh(device_type, (world // size, size), mesh_dim_names=("slide", "tile"))
    return TileMesh(mesh.get_group("tile"), rank % size, size, rank // size, world // size, mesh)
