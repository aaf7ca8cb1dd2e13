"""What the ranks of a machine share, each plans with its part of."""

import shutil
from types import SimpleNamespace

import psutil
import pytest

from ds_wsi.engines.machine import nvme
from ds_wsi.runtime import environment, memory
from ds_wsi.runtime.environment import ranks_on_machine

NAMES = (*environment._LOCAL_SIZES, "SLURM_NTASKS_PER_NODE", "SLURM_STEP_ID")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "4"}, 4),  # torchrun, accelerate launch
        ({"LOCAL_SIZE": "8"}, 8),  # deepspeed
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 2),
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_STEP_ID": "0"}, 4),
        ({"SLURM_NTASKS_PER_NODE": "4"}, 1),  # a batch script's own process
        ({"LOCAL_WORLD_SIZE": "4", "SLURM_NTASKS_PER_NODE": "1", "SLURM_STEP_ID": "0"}, 4),  # srun torchrun
        ({"LOCAL_WORLD_SIZE": "0", "LOCAL_SIZE": "many"}, 1),
    ],
)
def test_launchers_say_how_many_ranks_share_the_machine(variables, ranks, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ranks_on_machine() == ranks


def test_four_ranks_plan_with_half_of_the_machine_together(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))  # below any group's limit
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**40))
    alone = memory.free_host_bytes(), memory.free_disk_bytes(tmp_path)
    assert alone == (2**29, 2**39)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 4 * memory.free_host_bytes() == alone[0]
    assert 4 * memory.free_disk_bytes(tmp_path) == alone[1]


def test_the_disk_under_the_host_store_is_shared_too(tmp_path, monkeypatch):
    monkeypatch.setattr(nvme, "_aio_handle", lambda: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**40))
    monkeypatch.setattr(nvme.os, "O_DIRECT", 0)  # a temporary folder may be on a file system without
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert nvme.NvmeSpill(tmp_path).budget_bytes == 2**37
    assert nvme.NvmeSpill(tmp_path, 2**20).budget_bytes == 2**20  # given, it is a rank's own
