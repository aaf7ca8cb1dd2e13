"""Every process group follows the run's timeout, whoever makes it; torch's own default stays for groups outside."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from harness import _context, run_ranks

pytestmark = pytest.mark.distributed
ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2")


def zero(stage: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }


def timeouts() -> list[float]:
    from ds_wsi.engines.machine.timeouts import group_timeout

    return [group_timeout(group).total_seconds() for group in dist.distributed_c10d._world.pg_map]


def prepared(engine: str, timeout_s: int):
    from ds_wsi.engines.accelerator.engine import EngineSettings, build_accelerator, prepare

    config = zero(int(engine[-1])) if engine.startswith("zero") else None
    settings = EngineSettings(0.1, 0.0, 0.0, "sgd", 1, 1, timeout_s=timeout_s, fsdp=engine == "fsdp2")
    accelerator = build_accelerator(settings, Path("unused"), config)
    model, optimizer = prepare(accelerator, nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), settings)
    return accelerator, model, optimizer


def under_each_engine() -> list:
    from ds_wsi.engines.accelerator.scope import engine_scope
    from ds_wsi.tile_parallel import tile_mesh

    by_engine = []
    for number, engine in enumerate(ENGINES):
        with engine_scope():
            prepared(engine, 77 + number)
            tile_mesh(2)
            dist.new_group()
            by_engine.append(timeouts())
    dist.new_group()
    return [by_engine, timeouts()]


def test_all_groups_of_every_engine_have_the_runs_timeout():
    for by_engine, after in run_ranks(under_each_engine, 2):
        for number, (engine, seconds) in enumerate(zip(ENGINES, by_engine, strict=True)):
            assert set(seconds) == {77 + number}, engine
            assert len(seconds) >= 3  # the world's, the mesh's, the one that was made beside
        assert after[-1] == 1800  # torch's own for gloo: nothing of the run is left


def through_initialize() -> list[float]:
    import ds_wsi

    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=55), dist.group.WORLD)
    ds_wsi.initialize(model=nn.Linear(3, 2), config=zero(2))
    made = timeouts()
    dist.new_group()
    return [*made, timeouts()[-1]]


def test_a_script_of_its_own_says_the_timeout_when_it_makes_the_worlds_group():
    for *made, after in run_ranks(through_initialize, 2):
        assert len(made) > 1, "DeepSpeed cloned the world's group"
        assert set(made) == {55}
        assert after == 1800


def stops(rank: int, folder: Path, engine: str) -> None:
    """Two ranks train; rank 1 is stopped in the third step."""
    from ds_wsi.engines.machine import cpu
    from ds_wsi.runtime.ranks import RankFailureError, watch_ranks

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_SIZE="2", LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)
    cpu.skip_shm_op()
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    accelerator, model, optimizer = prepared(engine, 8)
    try:
        with watch_ranks():
            for step in range(100):
                accelerator.backward(model(torch.ones(1, 3)).sum())
                optimizer.step()
                optimizer.zero_grad()
                if rank == 1 and step == 2:
                    time.sleep(2)
                    os.kill(os.getpid(), signal.SIGSTOP)
            (folder / "0.said").write_text("it came to the end")
    except RankFailureError as error:
        (folder / "0.said").write_text(str(error))
    os._exit(0)


@pytest.mark.parametrize("engine", ["zero2", "ddp"])
def test_a_stopped_rank_is_named_within_the_timeout(engine, tmp_path):
    ranks = [_context.Process(target=stops, args=(rank, tmp_path, engine)) for rank in range(2)]
    started = time.monotonic()
    for process in ranks:
        process.start()
    ranks[0].join(60)
    seconds = time.monotonic() - started
    ranks[1].kill()
    for process in ranks:
        if process.is_alive():
            process.kill()
        process.join()
    said = (tmp_path / "0.said").read_text()
    assert "rank 1/2 " in said
    assert "it is stopped (SIGSTOP, or a debugger)" in said
    assert seconds < 45
