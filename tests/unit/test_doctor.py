"""`ds-wsi doctor` and `ds-wsi env`: each check in a broken world, with its remedy, and the exit status."""

import errno
import json
import os
import resource
import sys
import time
from collections import namedtuple
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import doctor_worlds as worlds
import pytest
import torch

from ds_wsi.cli import main
from ds_wsi.doctor import checks, compilers, device, engines, limits, machine, ranks, slide, versions
from ds_wsi.doctor.apart import ApartError, apart, finding_apart
from ds_wsi.doctor.checks import CHECKS, Check, run_check
from ds_wsi.doctor.finding import FAIL, PASS, WARN, Finding, worst
from ds_wsi.runtime.seams import SEEN, Seam
from ds_wsi.runtime.seams import checks as seam_checks

SHORT_S = 10.0


def assert_is(finding, status, found, remedy):
    assert finding.status == status
    assert found in finding.found, finding
    assert remedy in finding.remedy, finding
    assert bool(finding.remedy) == (status != PASS)


# --- processes of their own ---


def test_processes_answer_by_rank_and_know_no_other_launcher(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert apart(worlds.rank_and_sum, 1, 2, n_ranks=2, timeout_s=30) == [["0", "2", None, 3], ["1", "2", None, 3]]


def test_a_rank_that_hangs_is_named_and_ended(tmp_path):
    finding = finding_apart(
        worlds.hang_on_rank_1, str(tmp_path / "pid"), n_ranks=2, timeout_s=SHORT_S, remedy="do this"
    )
    assert_is(finding, FAIL, f"rank 1 of 2: no answer within {SHORT_S:g} s", "do this")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    ("function", "n_ranks", "words"),
    [
        (worlds.crash, 1, "the process died of SIGSEGV"),
        (worlds.leave, 1, "the process ended with status 3: the reason"),
        (worlds.fail_on_rank_1, 2, "rank 1 of 2: RuntimeError: no such op"),
    ],
)
def test_a_crash_and_an_error_are_told_in_a_line(function, n_ranks, words):
    with pytest.raises(ApartError) as left:
        apart(function, n_ranks=n_ranks, timeout_s=30)
    assert str(left.value) == words


def test_an_answer_stands_although_the_process_dies_at_its_exit():
    assert apart(worlds.answer_and_crash_at_exit, n_ranks=2, timeout_s=30) == ["the answer", "the answer"]


def test_the_worst_finding_is_that_of_all_ranks():
    assert worst([Finding(PASS, "a"), Finding(WARN, "b"), Finding(PASS, "c")]).found == "b"
    assert worst([Finding(WARN, "a"), Finding(FAIL, "b")]).found == "b"


# --- versions ---


def test_versions_of_this_environment():
    assert versions.check_versions().status in (PASS, WARN)


@pytest.mark.parametrize(
    ("requirements", "status", "found", "remedy"),
    [
        (["torch>=99"], FAIL, f"torch {torch.__version__.partition('+')[0]}", 'pip install "torch>=99"'),
        (["torch<2,>=1"], FAIL, "not <2,>=1", 'pip install "torch<2,>=1"'),
        (["no-such-package>=1"], FAIL, "no-such-package not installed", 'pip install "no-such-package>=1"'),
        (['torch>=99; extra == "lora"'], WARN, "not >=99", 'pip install "torch>=99"'),
        (['no-such-package>=1; extra == "lora"', "torch>=1"], PASS, "2 packages within the bounds", ""),
        (['torch>=99; python_version < "3"'], PASS, "0 packages", ""),
        (["pip", "numpy>=1"], PASS, "2 packages within the bounds", ""),
    ],
)
def test_versions_out_of_bounds(monkeypatch, requirements, status, found, remedy):
    monkeypatch.setattr(versions, "requires", lambda name: requirements)
    assert_is(versions.check_versions(), status, found, remedy)


def test_an_old_python(monkeypatch):
    monkeypatch.setattr(versions.platform, "python_version", lambda: "3.8.1")
    assert_is(versions.check_versions(), FAIL, "Python 3.8.1, not >=3.11", "an environment of Python >=3.11")


def test_a_folder_that_is_not_installed(monkeypatch):
    def requires(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(versions, "requires", requires)
    assert_is(versions.check_versions(), WARN, "not installed", "pip install -e .")


def test_a_package_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = versions.import_all(["json", "broken_package"])
    assert_is(finding, FAIL, "broken_package (OSError: libcudart.so.13: cannot open", "--force-reinstall")
    assert versions.import_all(["json"]) == Finding(PASS, "1 module imported")


def test_private_names_that_are_gone(monkeypatch):
    row = Seam("torch.gone:*._size", "x", "a shape")
    monkeypatch.setattr(versions, "SEEN", {"torch": SEEN["torch"]})
    monkeypatch.setattr(seam_checks, "SEAMS", (row, row._replace(since="99")))
    finding = versions.import_and_look(["json"])
    assert_is(finding, FAIL, "are gone: torch.gone > _size (a shape)", f'pip install "torch=={SEEN["torch"][1]}"')
    monkeypatch.setattr(seam_checks, "SEAMS", (row._replace(optional=True),))
    assert_is(versions.import_and_look(["json"]), PASS, "1 module imported, ", "")


# --- limits ---


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
    known = SimpleNamespace(name="Tesla", major=3, minor=5)
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_properties=lambda index: known,
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


# --- slides, ranks, engines, ops ---


def test_a_slide_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_is(slide.read_a_slide(), PASS, "20 tiles of 2 levels", "")


def test_a_tiff_that_cannot_be_opened(tmp_path, monkeypatch):
    from ds_wsi.slides import pyramid

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pyramid, "write_pyramid", lambda path, picture, mpp: path.write_bytes(b"II*\0broken"))
    assert_is(slide.read_a_slide(), FAIL, "slide.tiff", "pip install --force-reinstall openslide-python")


def test_a_slide_with_other_pixels(tmp_path, monkeypatch):
    from ds_wsi.slides import pyramid

    write = pyramid.write_pyramid
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pyramid, "write_pyramid", lambda path, picture, mpp: write(path, 255 - picture, mpp))
    assert_is(slide.read_a_slide(), FAIL, "pixels are wrong", "pip install --force-reinstall openslide-python")


def test_no_codec(tmp_path, monkeypatch):
    """What a library raises is the check's failure, with its words."""

    def write(path, picture, mpp):
        raise KeyError("JPEG requires the 'imagecodecs' package")

    from ds_wsi.slides import pyramid

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pyramid, "write_pyramid", write)
    finding = run_check(Check("slide", slide.read_a_slide))
    assert_is(finding, FAIL, "imagecodecs", "DS_WSI_TRACEBACK=1")


@pytest.mark.distributed
def test_ranks(monkeypatch):
    assert_is(ranks.check_ranks(), PASS, "two gloo processes", "")
    monkeypatch.setattr(ranks, "sum_of_ranks", worlds.sum_without_exchange)
    assert_is(ranks.check_ranks(), FAIL, "is 1", "GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(ranks, "sum_of_ranks", worlds.rank_1_does_not_come)
    monkeypatch.setattr(ranks, "RANKS_S", SHORT_S)
    assert_is(ranks.check_ranks(), FAIL, f"no answer within {SHORT_S:g} s", "GLOO_SOCKET_IFNAME")


def test_an_engine_that_raises(monkeypatch):
    monkeypatch.setattr(engines, "device_count", lambda: 0)
    monkeypatch.setitem(engines.INSTEAD, "zero9", "take another")
    finding = engines.engine_check("zero9")()
    assert_is(finding, FAIL, "ValueError: engine must be one of", "take another")


def test_an_engine_that_computes_something_else(monkeypatch):
    monkeypatch.setattr(engines, "device_count", lambda: 0)
    monkeypatch.setattr(engines, "two_steps", worlds.at_another_rate)
    assert_is(engines.engine_check("ddp")(), FAIL, "from plain PyTorch's", "force-reinstall accelerate")


def test_an_engine_without_torch(monkeypatch):
    def device_count():
        raise ApartError("the process died of SIGSEGV")

    monkeypatch.setattr(engines, "device_count", device_count)
    assert_is(engines.engine_check("zero2")(), FAIL, "died of SIGSEGV", "device")


def test_compilers(monkeypatch):
    from ds_wsi.engines.machine import cpu, ops

    assert_is(compilers.look_for_compilers(), PASS, "", "")
    monkeypatch.setattr(cpu, "without_gpu", lambda: False)
    monkeypatch.setattr(ops, "is_installed", lambda name: False)
    monkeypatch.setattr(ops, "cuda_op_lacks", lambda name: "nvcc of CUDA 13.0 is needed (no nvcc)")
    monkeypatch.setattr(ops, "compiler_lacks", lambda: None)
    assert_is(compilers.look_for_compilers(), WARN, "FusedAdam: nvcc of CUDA 13.0", '"torch_adam": true')
    monkeypatch.setattr(ops, "cuda_op_lacks", lambda name: None)
    monkeypatch.setattr(ops, "compiler_lacks", lambda: "no g++ on the PATH")
    assert_is(compilers.look_for_compilers(), WARN, "CPUAdam: no g++", "install g++ and ninja")


# --- the command ---


def test_every_check_has_a_limit_and_the_engines_are_not_quick():
    assert [check.name for check in CHECKS if not check.quick] == [f"engine {name}" for name in engines.INSTEAD]
    assert all(check.timeout_s <= 150 for check in CHECKS)
    from ds_wsi.engines.accelerator.stepper import ENGINES

    assert set(engines.INSTEAD) == set(ENGINES)


def test_a_check_that_hangs_or_raises_has_failed():
    assert_is(run_check(Check("slow disk", lambda: time.sleep(2), 0.1)), FAIL, "no answer within 0.1 s", "report it")
    assert_is(run_check(Check("fault", lambda: {}["key"])), FAIL, "KeyError: 'key'", "report it")


@pytest.mark.parametrize(("statuses", "code"), [((PASS, WARN), 0), ((PASS, FAIL, WARN), 1)])
def test_the_commands_lines_and_status(monkeypatch, capsys, statuses, code):
    remedies = {PASS: "", WARN: "do this", FAIL: "do that"}
    made = [
        Check(f"check {i}", lambda status=status: Finding(status, "found", remedies[status]), quick=status != WARN)
        for i, status in enumerate(statuses)
    ]
    monkeypatch.setattr(checks, "CHECKS", made)
    assert main(["doctor"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith(statuses)]) == len(statuses)
    assert any(line.strip() == "HINT: do this." for line in lines)
    assert main(["doctor", "--quick", "--json"]) == code
    printed = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in printed["checks"]] == [status for status in statuses if status != WARN]
    assert [row["remedy"] for row in printed["checks"]] == [remedies[status] for status in statuses if status != WARN]
    assert sum(printed["counts"].values()) == len(printed["checks"])


def test_env(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert set(found["packages"]) == {one.name for one in versions.needed_packages()}
    assert found["torch"]["devices"] == []
    assert found["memory"]["bytes"] > 2**28
    assert main(["env"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line.startswith("deepspeed"))
    assert lines["deepspeed"] == found["packages"]["deepspeed"]


def test_env_of_gpus(monkeypatch, capsys):
    known = namedtuple("Properties", "name major minor total_memory")("H200", 9, 0, 2**37)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: known)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (2**36, 2**37))
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert "H200" in printed
    assert "128.0 GiB" in printed
    assert " 9.0" in printed


def test_env_with_a_broken_torch(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["env", "--json"]) == 0
    assert "ModuleNotFoundError" in json.loads(capsys.readouterr().out)["torch"]["problem"]


def test_the_driver_is_read_where_the_kernel_tells_it(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_DRIVER", tmp_path / "version")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.nvidia_driver() is None
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri Jan 17\nGCC version: 12.2\n"
    (tmp_path / "version").write_text(text)
    assert machine.nvidia_driver() == "570.86.15"
    (tmp_path / "version").unlink()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 550.1\necho 550.1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert machine.nvidia_driver() == "550.1"
