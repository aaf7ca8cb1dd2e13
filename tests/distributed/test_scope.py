"""What the processes of a launcher do together between two runs."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_wsi.engines.accelerator import scope
from ds_wsi.engines.accelerator.engine import EngineSettings, build_accelerator
from ds_wsi.engines.accelerator.scope import engine_scope, launched
from harness import run_ranks

pytestmark = pytest.mark.distributed
SETTINGS = EngineSettings(0.1, 0.0, 0.0, "sgd", 1, 1)


def decide() -> list:
    calls: list[int] = []
    with launched(SETTINGS, None) as processes:
        for number in range(2):
            answer = processes.on_main(lambda number=number: calls.append(number) or {"number": number})
            assert answer == {"number": number}
        try:
            processes.on_main(lambda: int("no number"))
        except ValueError:
            ended = "ValueError"
        except SystemExit as error:
            ended = f"SystemExit {error.code}"
    return [processes.rank, processes.world_size, len(calls), ended, dist.is_initialized()]


def test_the_main_process_decides_for_all_and_fails_for_all():
    """A group that was there before stays; what is known to one is known to all; nobody waits for a failed one."""
    assert run_ranks(decide, 2) == [[0, 2, 2, "ValueError", True], [1, 2, 0, "SystemExit 2", True]]


def kinds() -> list[str]:
    from ds_wsi.engines.accelerator.stepper import Stepper

    return [type(Stepper(engine, nn.Linear(2, 2), "sgd", 0.1).model).__name__ for engine in ("zero1", "ddp")]


def test_an_engine_without_deepspeed_follows_one_with_it():
    assert run_ranks(kinds, 2)[0] == ["DeepSpeedEngine", "DistributedDataParallel"]


def several(port: int, end: str) -> list[float]:
    """Three runs that find no group, as `ds-wsi train` does, and leave none; rank 0 is late for each but the first."""
    rank = dist.get_rank()
    dist.barrier()  # a group that one rank leaves before the other has connected never was
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    sums = []
    for number in range(3):
        with engine_scope():
            accelerator = build_accelerator(replace(SETTINGS, timeout_s=60), Path(), None)
            summed = accelerator.reduce(torch.tensor([accelerator.process_index + 10.0**number]))
            sums.append(float(summed))
            if rank == 0:
                time.sleep(1)
        sums.append(float(dist.is_initialized()))
    dist.init_process_group("gloo", store=dist.FileStore(end, 2), rank=rank, world_size=2)
    return sums


def test_several_runs_one_after_the_other_each_form_a_group(tmp_path):
    """Addresses of the first group stay in the launcher's store: the second group met nobody, and waited for ever."""
    launcher = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert run_ranks(several, 2, launcher.port, str(tmp_path / "end")) == [[3.0, 0.0, 21.0, 0.0, 201.0, 0.0]] * 2


def test_deepspeed_forgets_the_group_of_the_engine_before(monkeypatch):
    """Else a second training in one process ends with a group that is not registered."""
    groups = SimpleNamespace(_WORLD_GROUP="of the first engine")
    monkeypatch.setitem(sys.modules, "deepspeed.utils.groups", groups)
    there = iter((False, True))
    monkeypatch.setattr(dist, "is_initialized", lambda: next(there))
    monkeypatch.setattr(scope, "disconnect", lambda: None)
    with engine_scope():
        pass
    assert groups._WORLD_GROUP is None
