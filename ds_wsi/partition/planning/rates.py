"""How fast this machine computes and copies: measured once, kept in a file, assumed until then."""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from ds_wsi.runtime.files import read_object, write_json
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.pinned import locked_or_none


@dataclass(frozen=True)
class Rates:
    """The rates of one device.

    Args:
        flops: floating-point operations per second of convolutions, in the precision of training.
        memory: bytes per second that elementwise operations read and write.
        link: bytes per second to or from host memory, in one direction.
        launch: seconds that one operation costs however small it is.
        measured: whether they were.
        disk: bytes per second that a spill reads or writes; assumed, because it is the folder's, not the device's.
    """

    flops: float
    memory: float
    link: float
    launch: float
    measured: bool = False
    disk: float = 2e9


# A card of the RTX 3090's class, and one core: for plans made elsewhere than where they run.
ASSUMED = {"cuda": Rates(3.5e13, 7e11, 2.4e10, 1e-5), "cpu": Rates(6e10, 8e9, 6e9, 2e-5)}


def cache_path() -> Path | None:
    """The file of measured rates: below $XDG_CACHE_HOME, or ~/.cache; None for a user without a home, as of a pod."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "ds_wsi" / "rates.json"
    except RuntimeError:
        return None


def device_key(device: torch.device) -> str:
    """The name under which a device's rates are kept."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} thread(s)" if device.type == "cpu" else device.type


def find_rates(device: torch.device) -> Rates:
    """The measured rates of this device, or assumed ones."""
    path = cache_path()
    try:
        if path is not None:
            return _rates_of(read_object(path, "the table of rates")[device_key(device)])
    except FileNotFoundError:
        pass
    except (OSError, KeyError, TypeError, ValueError) as error:
        if not isinstance(error, KeyError):
            logger.warning("%s is not a table of rates (%s); assumed ones are used", path, error)
    return ASSUMED.get(device.type, ASSUMED["cuda"])


def _rates_of(values: Mapping[str, Any]) -> Rates:
    rates = Rates(**values)
    speeds = (rates.flops, rates.memory, rates.link, rates.launch, rates.disk)
    if not all(type(speed) in (int, float) and 0 < speed < math.inf for speed in speeds):
        raise ValueError(f"rates that are no positive numbers: {speeds}")
    return rates


def probe(device: torch.device) -> Rates:
    """Measure this device's rates (a few seconds), and store them where that can be; a warning says where it cannot.

    Raises:
        ValueError: the device is not here.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--probe must run where the device is, got cuda without a GPU. HINT: --device cpu.")
    gpu = device.type == "cuda"
    dtype, tiles = (torch.float16, 256) if gpu else (torch.float32, 8)
    image = torch.randn(tiles, 64, 56, 56, device=device, dtype=dtype)
    weight = torch.randn(64, 64, 3, 3, device=device, dtype=dtype)
    conv = _seconds(lambda: F.conv2d(image, weight, padding=1), device)
    add = _seconds(lambda: image + 1, device)
    size = image.numel() * image.element_size()
    locked = locked_or_none(size, device) if gpu else None
    host = torch.empty(image.shape, dtype=dtype) if locked is None else locked.data.view(dtype).view(image.shape)
    copy = _seconds(lambda: image.copy_(host, non_blocking=True), device)
    one = torch.zeros(1, device=device)
    launch = _seconds(lambda: one + 1, device)
    rates = Rates(2 * image.numel() * 64 * 9 / conv, 2 * size / add, size / copy, launch, measured=True)
    try:
        _keep(rates, device)
    except OSError as error:
        hint = "HINT: set XDG_CACHE_HOME to a folder to keep them in."
        logger.warning("the rates are not kept, and plans assume others: %s. %s", error, hint)
    return rates


def _keep(rates: Rates, device: torch.device) -> None:
    path = cache_path()
    if path is None:
        raise FileNotFoundError("there is no home folder")
    try:
        table = read_object(path, "the table of rates")
    except (OSError, ValueError):  # none yet, or none that can be read: measured again where it is wanted
        table = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**table, device_key(device): asdict(rates)})
    logger.info("rates of %s are kept in %s", device_key(device), path)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(10):
            work()
        wait()
        times.append((time.perf_counter() - start) / 10)
    return median(times)
