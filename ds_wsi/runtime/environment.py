"""What a number was measured with, and with how many processes this one shares its machine."""

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("ds_wsi", "torch", "torchvision", "deepspeed", "accelerate", "timm", "openslide-python", "openslide-bin")


# Ranks on this machine, as launchers say it: torchrun and Accelerate, DeepSpeed, Intel MPI, Open MPI, MVAPICH.
_LOCAL_SIZES = (
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
)

_OWN_OPTIONS = ("--shard", "--local_rank", "--local-rank")  # that say which process it is


def ranks_on_machine() -> int:
    """How many ranks of this run share the machine, its memory and its disks: what the launcher set, 1 without one.

    Slurm's number counts in a step that `srun` started alone: a batch script's own process is by itself.
    """
    names = (*_LOCAL_SIZES, "SLURM_NTASKS_PER_NODE") if "SLURM_STEP_ID" in os.environ else _LOCAL_SIZES
    for name in names:
        text = os.environ.get(name, "")
        if text.isdecimal() and int(text) > 0:
            return int(text)
    return 1


def environment() -> dict[str, str | int]:
    """Versions, processor and threads of this process."""
    import torch

    versions: dict[str, str | int] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    versions["cpu"] = cpu_name()
    versions["cpu_count"] = os.cpu_count() or 0
    versions["threads"] = torch.get_num_threads()
    versions["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return versions


def cpu_name() -> str:
    """The processor's model as Linux tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def command_line() -> str:
    """The command that this process was started with, ready for a shell; the same of all that share its work."""
    program, *arguments = sys.argv or [""]
    places = [at for at, word in enumerate(arguments) if word.partition("=")[0] in _OWN_OPTIONS]
    left_out = {at + step for at in places for step in range(1 if "=" in arguments[at] else 2)}
    arguments = [word for at, word in enumerate(arguments) if at not in left_out]
    name = Path(program).name
    return shlex.join([name if name == "ds-wsi" else program, *arguments])
