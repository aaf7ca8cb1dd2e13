"""A function in several processes of this machine that form a group: what a launcher does, for one measurement."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_wsi.engines.machine import cpu


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout_s: float = 1800,
    enter: Callable[[int], None] | None = None,
    context: Any = None,
) -> list[Any]:
    """`function(*arguments)` on every rank of a gloo group, one thread each; what each returned, by rank.

    Args:
        function: a function of a module, not of a script; what it returns must load with `weights_only`: tensors,
            numbers, strings, lists, dicts.
        world_size: ranks.
        arguments: the function's arguments.
        timeout_s: seconds after which all are killed.
        context: a context of multiprocessing; None spawns.
        enter: called with the rank before the group is made, such as `LimitedLink.enter`.

    Raises:
        RuntimeError: with the traceback of the first rank that failed, or at the time limit; no process outlives this.
    """
    context = context or multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            context.Process(target=_rank_main, args=(function, rank, world_size, folder, arguments, enter))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout_s
        while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
            if any(process.exitcode not in (None, 0) for process in ranks):
                break
            time.sleep(0.05)
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
        # The earliest is the cause, the others lost their peer.
        errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
        if errors:
            raise RuntimeError(f"rank {errors[0].stem} failed:\n{errors[0].read_text()}")
        missing = [rank for rank in range(world_size) if not (folder / f"{rank}.result").exists()]
        if missing:
            raise RuntimeError(f"ranks {missing} returned nothing within {timeout_s:g} s")
        return [torch.load(folder / f"{rank}.result", weights_only=True) for rank in range(world_size)]


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: Path,
    arguments: tuple,
    enter: Callable[[int], None] | None,
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size))
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    try:
        if enter is not None:
            enter(rank)
        cpu.skip_shm_op()
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        torch.save(function(*arguments), folder / f"{rank}.result")
        dist.barrier()
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
