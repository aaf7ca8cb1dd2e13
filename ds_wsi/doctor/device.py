"""Whether torch can compute on the devices that it should see."""

import os
from functools import cache
from typing import Any

from ds_wsi.doctor.apart import apart, finding_apart
from ds_wsi.doctor.finding import FAIL, PASS, WARN, Finding, worst
from ds_wsi.doctor.machine import nvidia_driver
from ds_wsi.runtime.units import format_bytes

DEVICE_S = 60
SIDE = 256  # of the matrices
BOUND = 1e-12  # of float64 products of values in [0, 1)
FREE_SHARE = 0.5
_REMEDY = "install the torch build of this machine's driver: https://pytorch.org/get-started/locally"


def check_device() -> Finding:
    """Whether each device computes, and whether its memory is free."""
    return finding_apart(look_at_devices, timeout_s=DEVICE_S, remedy=_REMEDY)


@cache
def device_count() -> int:
    """How many GPUs torch can use, asked in a process of its own; 0 on a CPU.

    Raises:
        ApartError: torch cannot be imported.
    """
    return int(apart(_count, timeout_s=DEVICE_S)[0])


def _count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def look_at_devices() -> Finding:
    """Multiply on each device, or on the CPU where there is none. In a process of its own."""
    import torch

    if torch.cuda.is_available():
        return worst(_gpu_finding(torch, index) for index in range(torch.cuda.device_count()))
    driver = nvidia_driver()
    if driver is not None:
        return _unseen(torch, driver)
    error = product_error(torch, torch.device("cpu"))
    if not error <= BOUND:
        return Finding(FAIL, f"a product of matrices on the CPU is wrong by {error:.1e}", _REMEDY)
    return Finding(PASS, f"no GPU: torch {torch.__version__} computes on the CPU")


def _unseen(torch: Any, driver: str) -> Finding:
    """A driver of NVIDIA's is here, and torch sees no device."""
    words = f"NVIDIA driver {driver}, but torch {torch.__version__} sees no GPU"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return Finding(WARN, f"{words}: CUDA_VISIBLE_DEVICES={hidden!r}", "unset CUDA_VISIBLE_DEVICES to train on it")
    if torch.version.cuda is None:
        return Finding(FAIL, f"{words}: it is a build without CUDA", _REMEDY)
    try:
        torch.cuda.init()
    except Exception as error:
        words += f": {(str(error).splitlines() or [''])[0][:200]}"
    return Finding(FAIL, words, f"update the driver for CUDA {torch.version.cuda}, or {_REMEDY}")


def _gpu_finding(torch: Any, index: int) -> Finding:
    properties = torch.cuda.get_device_properties(index)
    name = f"cuda:{index} {properties.name}, capability {properties.major}.{properties.minor}"
    try:
        error = product_error(torch, torch.device("cuda", index))
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as failed:
        lines = str(failed).splitlines() or [""]
        return Finding(FAIL, f"{name}: {lines[0][:200]}", _REMEDY)
    if not error <= BOUND:
        return Finding(FAIL, f"{name}: a product of matrices is wrong by {error:.1e}", "replace or reset the GPU")
    words = f"{name}: {format_bytes(free)} of {format_bytes(total)} free"
    if free < FREE_SHARE * total:
        return Finding(WARN, words, "nvidia-smi names the processes that hold the rest; CUDA_VISIBLE_DEVICES chooses")
    return Finding(PASS, words)


def product_error(torch: Any, device: Any) -> float:
    """How far a product of float64 matrices on a device is from its rows' sums, relative."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.rand(SIDE, SIDE, dtype=torch.float64, generator=generator) for _ in range(2))
    expected = (left.unsqueeze(2) * right.unsqueeze(0)).sum(1)
    product = (left.to(device) @ right.to(device)).cpu()
    return float(((product - expected).abs() / expected).max())
