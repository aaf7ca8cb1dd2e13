"""`ds-wsi doctor` and `ds-wsi env`: each check in a broken world, with its remedy, and the exit status."""

import json
import os
import sys
import time
from collections import namedtuple
from importlib.metadata import PackageNotFoundError

import doctor_worlds as worlds
import pytest
import torch
from doctor_findings import assert_is

from ds_wsi.cli import main
from ds_wsi.doctor import checks, compilers, engines, machine, ranks, slide, versions
from ds_wsi.doctor.apart import ApartError, apart, finding_apart
from ds_wsi.doctor.checks import CHECKS, Check, run_check
from ds_wsi.doctor.finding import FAIL, PASS, WARN, Finding, worst
from ds_wsi.runtime.seams import SEEN, Seam
from ds_wsi.runtime.seams import checks as seam_checks

SHORT_S = 10.0


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
    environment = json.loads(capsys.readouterr().out)
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert set(environment["packages"]) == {one.name for one in versions.needed_packages()}
    assert environment["torch"]["devices"] == []
    assert environment["memory"]["bytes"] > 2**28
    assert main(["env"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line.startswith("deepspeed"))
    assert lines["deepspeed"] == environment["packages"]["deepspeed"]


def test_env_of_gpus(monkeypatch, capsys):
    properties = namedtuple("Properties", "name major minor total_memory")("H200", 9, 0, 2**37)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
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
