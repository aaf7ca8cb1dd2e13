"""What `ds-wsi doctor` says of the machine: its limits and its devices."""

import errno
import os
import resource
from types import SimpleNamespace

import pytest
import torch
from doctor_findings import assert_is

from ds_wsi.doctor import device, limits, machine
from ds_wsi.doctor.finding import FAIL, PASS, WARN


def full(*arguments, **keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("check", [limits.check_working_folder, limits.check_temporary_folder])
def test_disks(monkeypatch, check):
    remedy = "--output_dir" if check is limits.check_working_folder else "TMPDIR"
    for free, status in ((2**40, PASS), (2**31, WARN), (2**20, FAIL)):
        monkeypatch.setattr(limits, "free_bytes", lambda folder, free=free: free)
        assert_is(check(), status, "free", remedy if status != PASS else "")
    monkeypatch.setattr(limits.tempfile, "TemporaryFile", full)
    assert_is(check(), FAIL, "No space left on device", remedy)


def test_no_temporary_folder(monkeypatch):
    def gettempdir():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(limits.tempfile, "gettempdir", gettempdir)
    assert_is(limits.check_temporary_folder(), FAIL, "No usable temporary directory", "set TMPDIR")


def test_shared_memory_is_only_told(monkeypatch, tmp_path):
    assert "nothing here uses it" in limits.check_shared_memory().found
    monkeypatch.setattr(limits, "_SHM", tmp_path / "none")
    assert_is(limits.check_shared_memory(), PASS, "no ", "")


@pytest.mark.parametrize(
    ("soft", "hard", "status", "remedy"),
    [
        (4096, 4096, PASS, ""),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, PASS, ""),
        (256, resource.RLIM_INFINITY, WARN, "ulimit -n 4096"),
        (64, 4096, FAIL, "ulimit -n 4096"),
        (64, 64, FAIL, "by the administrator"),
    ],
)
def test_open_files(monkeypatch, soft, hard, status, remedy):
    monkeypatch.setattr(limits.resource, "getrlimit", lambda which: (soft, hard))
    assert_is(limits.check_open_files(), status, "limit", remedy)


@pytest.mark.parametrize(
    ("omp", "cores", "n_ranks", "status", "found", "remedy"),
    [
        ("1", 2, 1, PASS, "2 cores, 1 rank here, OMP_NUM_THREADS=1", ""),
        ("4", 8, 2, PASS, "OMP_NUM_THREADS=4", ""),
        ("8", 8, 4, WARN, "threads wait for each other", "OMP_NUM_THREADS=2"),
        ("two", 2, 1, WARN, "which OpenMP ignores", "OMP_NUM_THREADS=2"),
        (None, 10_000, 1, PASS, "not set: a thread for each core", ""),
        (None, 1, 2, WARN, "not set", "OMP_NUM_THREADS=1"),
    ],
)
def test_threads(monkeypatch, omp, cores, n_ranks, status, found, remedy):
    monkeypatch.delenv("OMP_NUM_THREADS")
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.setattr(limits, "usable_cores", lambda: cores)
    monkeypatch.setattr(limits, "ranks_on_machine", lambda: n_ranks)
    assert_is(limits.check_threads(), status, found, remedy)


def test_a_control_groups_quota_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(machine, "_QUOTA", tmp_path / "cpu.max")
    assert machine.usable_cores() == 8
    for text, cores in (("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("3200000 100000", 8)):
        (tmp_path / "cpu.max").write_text(text)
        assert machine.usable_cores() == cores


# --- the device ---


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "nvidia_driver", lambda: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_cpu_computes(no_gpu, monkeypatch):
    assert_is(device.look_at_devices(), PASS, "computes on the CPU", "")
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda self, other: product(self, other) * (1 + 1e-9))
    assert_is(device.look_at_devices(), FAIL, "wrong by 1.0e-09", "install the torch build")


def test_a_gpu_that_torch_does_not_see(no_gpu, monkeypatch):
    monkeypatch.setattr(device, "nvidia_driver", lambda: "470.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert_is(device.look_at_devices(), FAIL, "a build without CUDA", "install the torch build")

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    assert_is(device.look_at_devices(), FAIL, "driver on your system is too old", "update the driver for CUDA 13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert_is(device.look_at_devices(), WARN, "CUDA_VISIBLE_DEVICES=''", "unset CUDA_VISIBLE_DEVICES")


def test_a_gpu_that_fails_or_is_taken(monkeypatch):
    properties = SimpleNamespace(name="Tesla", major=3, minor=5)
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_properties=lambda index: properties,
        mem_get_info=lambda index: (2**30 * (10 if index else 2), 2**30 * 10),
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(device, "product_error", lambda torch, device: 0.0)
    assert_is(device.look_at_devices(), WARN, "cuda:0 Tesla, capability 3.5: 2.0 GiB of 10.0 GiB free", "nvidia-smi")
    monkeypatch.setattr(device, "product_error", lambda torch, device: float("nan"))
    assert_is(device.look_at_devices(), FAIL, "is wrong by nan", "replace")

    def no_kernel(torch, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(device, "product_error", no_kernel)
    assert_is(device.look_at_devices(), FAIL, "capability 3.5: CUDA error: no kernel image", "install the torch build")
