"""A hook's state in a checkpoint: one file per rank."""

from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from ds_wsi.compression import fold_states
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.tensor_file import of_rank

KIND = "comm_hook"


def on_host(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """This rank's file by its name, its tensors copied to the host; none where the state is empty."""
    if not state:
        return {}
    copied = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    return {of_rank(KIND, dist.get_rank(), dist.get_world_size()): copied}


def write_state(folder: Path, state: dict[str, Tensor]) -> None:
    """Write this rank's state; nothing where it is empty."""
    for name, tensors in on_host(state).items():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / name)


def read_states(folder: Path) -> dict[str, Tensor]:
    """This rank's state, folded from all where the number of ranks has changed.

    Raises:
        ValueError: no state there, or not that of all ranks.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    rank_path = folder / of_rank(KIND, rank, world)
    if rank_path.is_file():
        return load_file(rank_path)
    paths = sorted(folder.glob(f"{KIND}-*-of-*.safetensors"))
    worlds = {path.stem.split("-")[-1] for path in paths}
    if not paths or len(worlds) != 1 or len(paths) != int(next(iter(worlds))):
        raise ValueError(
            f"a checkpoint must hold the hook's state of every rank, got {len(paths)} files ({folder}). "
            "HINT: resume without a hook, or from a checkpoint of a run that had one"
        )
    if rank == 0:
        logger.warning(
            "the hook's state of %d ranks goes on with %d: each starts with the mean of their residuals",
            len(paths),
            world,
        )
    return fold_states([load_file(path) for path in paths])
