"""What a number was measured with."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("ds_wsi", "torch", "torchvision", "deepspeed", "accelerate", "timm", "openslide-python", "openslide-bin")


def environment() -> dict[str, str | int]:
    """Versions, processor and threads of this process."""
    found: dict[str, str | int] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["cpu"] = _cpu_name()
    found["cpu_count"] = os.cpu_count() or 0
    found["threads"] = torch.get_num_threads()
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return found


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
