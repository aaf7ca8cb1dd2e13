"""Runs a function in several gloo processes here; torch and DeepSpeed are imported once, in the forkserver."""

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

TIMEOUT_S = 240
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "deepspeed", "accelerate", "timm"])


def _rank_main(function: Callable[..., Any], rank: int, world_size: int, folder: Path, arguments: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size))
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    try:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
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


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """`function(*arguments)` on every rank of a gloo group; returns what each rank returned, by rank.

    What is returned must load with `weights_only`: tensors, numbers, strings, lists, dicts.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or at the time limit; no process outlives
            the call.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            _context.Process(target=_rank_main, args=(function, rank, world_size, folder, arguments))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + TIMEOUT_S
        # One failed rank ends the wait: the others would hang in their next collective.
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
        assert not errors, f"rank {errors[0].stem} failed:\n{errors[0].read_text()}"
        missing = [rank for rank in range(world_size) if not (folder / f"{rank}.result").exists()]
        assert not missing, f"ranks {missing} returned nothing within {TIMEOUT_S} s"
        return [torch.load(folder / f"{rank}.result", weights_only=True) for rank in range(world_size)]
