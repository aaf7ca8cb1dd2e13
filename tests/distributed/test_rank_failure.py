"""A rank that dies or fails stops the others, in time and with its number."""

import logging
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from ds_wsi.runtime.log import logger
from ds_wsi.runtime.ranks import RankFailureError, watch_ranks
from ds_wsi.tile_parallel import tile_mesh
from harness import _context

pytestmark = pytest.mark.distributed


def one_rank(rank, folder, how):
    """Three ranks share bags; rank 1 goes away after the first exchange."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 3)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    mesh = tile_mesh(3)
    try:
        with watch_ranks():
            for step in range(100):
                dist.all_reduce(torch.ones(3), group=mesh.group)
                if rank == 1 and step == 3:
                    time.sleep(2.5)  # computes, while the others wait
                    if how == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise MemoryError("CUDA out of memory")
    except RankFailureError as error:
        (folder / f"{rank}.said").write_text(str(error))
    except MemoryError:
        time.sleep(0.1)
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("killed", "rank 1/3 died without a word (killed, or out of memory?)"),
        ("raises", "rank 1/3 failed (MemoryError: CUDA out of memory)"),
    ],
)
def test_the_others_stop_and_name_it(how, words, tmp_path):
    ranks = [_context.Process(target=one_rank, args=(rank, tmp_path, how)) for rank in range(3)]
    started = time.monotonic()
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert time.monotonic() - started < 50
    assert not any(process.is_alive() for process in ranks)
    for rank in (0, 2):
        said = (tmp_path / f"{rank}.said").read_text()
        assert said.startswith(words), said
        assert f"seen by rank {rank}/3" in said


def waits_outside(rank, folder, how):
    """Rank 0 never comes to a collective that fails: as under NCCL, where none raises, it can only read its log."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    logger.addHandler(logging.FileHandler(folder / f"{rank}.log"))
    try:
        with watch_ranks():
            time.sleep(2.5)
            if rank == 1 and how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == 1 and how == "raises":
                raise MemoryError("CUDA out of memory")
            if rank == 0:
                time.sleep(10)
    except MemoryError:
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("killed", "rank 1/2 died without a word (killed, or out of memory?): no sign of it for 6 s, seen by rank 0/2"),
        ("raises", "rank 1/2 failed (MemoryError: CUDA out of memory), seen by rank 0/2"),
        ("leaves", ""),
    ],
)
def test_a_rank_that_waits_for_no_exception_reads_it_in_its_log(how, words, tmp_path):
    ranks = [_context.Process(target=waits_outside, args=(rank, tmp_path, how)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert not any(process.is_alive() for process in ranks)
    said = (tmp_path / "0.log").read_text()
    assert said.startswith(words), said
    assert len(said.splitlines()) == (1 if words else 0)


def prepares(rank, folder, manifest, how):
    """Rank 1 goes away while the cohort is tiled, before anything is trained; rank 0 waits for it."""
    from ds_wsi.config import DsWsiConfig
    from ds_wsi.engines.machine import cpu
    from ds_wsi.slides.policy import TilingPolicy
    from ds_wsi.training import loop, run_cohort
    from ds_wsi.training.settings import DataSettings, ModelSettings, RunSettings, TrainSettings

    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)
    cpu.skip_shm_op()
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    handler = logging.FileHandler(folder / f"{rank}.log")
    logger.addHandler(handler)
    if rank == 1:

        def goes(*arguments, **keywords):
            time.sleep(2)
            if how == "raises":
                raise MemoryError("no memory for the grids")
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)

        run_cohort.load_cohort = goes
    settings = TrainSettings(
        DataSettings(manifest=manifest, tiles_dir=str(folder / "tiles")),
        ModelSettings(encoder="resnet10t"),
        run=RunSettings(output_dir=str(folder / "run"), ddp_timeout=16, disable_tqdm=True),
        policies=DsWsiConfig(tiling=TilingPolicy(tile_size_px=64)),
    )
    try:
        loop.train(settings)
    except RankFailureError as error:
        (folder / f"{rank}.said").write_text(str(error))
    except MemoryError:
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize(
    ("how", "words", "in_the_log"),
    [
        ("killed", "rank 1/2 died without a word (killed, or out of memory?)", ""),
        ("raises", "rank 1/2 failed (MemoryError: no memory for the grids)", ""),
        # Its connections stay open: long before the collective gives up, the log names it.
        ("stopped", "SIGSTOP, or a debugger", "it is stopped (SIGSTOP, or a debugger)): no sign of it for 6 s"),
    ],
)
def test_a_rank_that_goes_in_preparation_is_named(how, words, in_the_log, tmp_path, demo_manifest):
    ranks = [_context.Process(target=prepares, args=(rank, tmp_path, str(demo_manifest), how)) for rank in range(2)]
    started = time.monotonic()
    for process in ranks:
        process.start()
    ranks[0].join(90)
    seconds = time.monotonic() - started
    for process in ranks:
        if process.is_alive():
            process.kill()
        process.join()
    said = (tmp_path / "0.said").read_text()
    assert words in said
    assert "seen by rank 0/2" in said
    assert in_the_log in (tmp_path / "0.log").read_text()
    assert seconds < 75
