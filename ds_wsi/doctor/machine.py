"""What `ds-wsi env` tells: versions, devices, cores, memory."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import psutil

import ds_wsi
from ds_wsi.doctor.versions import installed_version, needed_packages
from ds_wsi.runtime.environment import cpu_name, ranks_on_machine
from ds_wsi.runtime.full_disk import free_bytes

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_DRIVER = Path("/proc/driver/nvidia/version")
_ASK_S = 10


def describe_machine() -> dict[str, Any]:
    """Versions, devices, cores and memory, as JSON can hold them; sizes in bytes.

    A torch that cannot be imported is told with its reason, and no device is.
    """
    memory = psutil.virtual_memory()
    return {
        "ds_wsi": {"version": installed_version("ds_wsi"), "folder": str(Path(ds_wsi.__file__).parent)},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "packages": package_versions(),
        "torch": describe_torch(),
        "driver": nvidia_driver(),
        "compilers": {name: shutil.which(name) for name in ("nvcc", "g++", "ninja")},
        "cpu": {"name": cpu_name(), "cores": usable_cores(), "processors": os.cpu_count() or 0},
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "ranks_here": ranks_on_machine(),
        "memory": {"bytes": memory.total, "free_bytes": memory.available},
        "disk": {"folder": str(Path.cwd()), "free_bytes": free_bytes(Path.cwd())},
    }


def package_versions() -> dict[str, str | None]:
    """Each package that ds_wsi requires or can use, with its version; None where it is not installed."""
    try:
        names = [one.name for one in needed_packages()]
    except PackageNotFoundError:
        names = ["torch", "deepspeed", "accelerate"]
    return {name: installed_version(name) for name in names}


def describe_torch() -> dict[str, Any]:
    """What torch was built for, and its devices; {"problem": why} where it cannot be imported."""
    try:
        import torch
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {error}"}
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "free_bytes": torch.cuda.mem_get_info(index)[0],
            }
        )
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "devices": devices,
    }


def nvidia_driver() -> str | None:
    """The version of NVIDIA's driver; None where there is none."""
    try:
        words = _DRIVER.read_text().splitlines()[0].split()
        return next(word for word in words if word[0].isdigit() and "." in word)
    except (OSError, IndexError, StopIteration):
        pass  # as under WSL, whose driver is Windows'
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def usable_cores() -> int:
    """Cores that this process may use: of its affinity, and of its control group's quota, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        pass  # no control group, or an older kind
    return cores
