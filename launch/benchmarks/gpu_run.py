"""One run of the benchmarks on a GPU: its rows on disk as they come, its time, and what an earlier run has done."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.partition.planning.rates import Rates
from ds_wsi.runtime.files import write_json
from ds_wsi.runtime.log import logger
from launch.benchmarks.device_training import Machine, Training

GIB = 2**30
COLUMNS = (
    "part",
    "case",
    "mode",
    "cap_gib",
    "seconds",
    "peak_gib",
    "allocated_gib",
    "reserved_gib",
    "alloc_retries",
    "planned_s",
    "planned_gib",
    "ratio",
    "peak_ratio",
    "over",
    "plan",
)
SAME = ("device", "precision", "quick", "torch")  # notes that runs which are one share


class TimeIsUpError(Exception):
    """A part that would not end in time."""


@dataclass
class Run:
    """What is measured on, by when, and what has been measured.

    Args:
        machine, rates: the device and its rates.
        whole: whether it runs at full size: parts then need time that is known beforehand.
        rows_file: the file to which the rows are written as they come.
        deadline: a time of time.monotonic().

    Attributes:
        rows: each with all of `COLUMNS`; "part" names the part that made it.
        notes: what is noted of the whole run, and of its parts.
        skipped: why, by part or by what is left out of one.
        done: parts that need not be measured again.
    """

    machine: Machine
    rates: Rates
    whole: bool
    rows_file: Path
    deadline: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def need(self, seconds: float, what: str) -> None:
        """Go on only if the time suffices."""
        if self.left < (seconds if self.whole else 0):
            raise TimeIsUpError(f"{what} needs about {seconds:.0f} s, {max(0.0, self.left):.0f} s are left")

    def row(self, training: Training | None, **values: Any) -> None:
        """Add a row and write all rows."""
        plan = training.plan if training else None
        cells: dict[str, Any] = dict.fromkeys(COLUMNS)
        if training:
            peaks = training.peaks
            cells |= {"peak_gib": training.peak_bytes / GIB, "alloc_retries": peaks.retries}
            cells |= {"allocated_gib": peaks.allocated / GIB, "reserved_gib": peaks.reserved / GIB}
        if plan and plan.mode == "partitioned":
            cells |= {"planned_s": plan.seconds, "planned_gib": plan.peak_bytes / GIB}
            cells["plan"] = " ".join(f"{part.mode}:{part.chunk_size}" for part in plan.segments)
        elif plan:
            cells["plan"] = plan.mode
        self.rows.append(cells | values)
        logger.info("%s", {key: value for key, value in self.rows[-1].items() if value is not None})
        self.save()

    def save(self) -> None:
        """Write what there is."""
        record = {"device": self.machine.name, "notes": self.notes, "skipped": self.skipped}
        write_json(self.rows_file, {**record, "done": self.done, "rows": self.rows})

    def resume(self) -> None:
        """Take over what a run on the same device has done, if the file of rows is of such a one."""
        if not self.rows_file.exists():
            return
        saved = json.loads(self.rows_file.read_text(encoding="utf-8"))
        if any(saved["notes"].get(name) != self.notes[name] for name in SAME):
            logger.warning("%s is of another device, precision or version: all is measured anew", self.rows_file)
            return
        self.done = saved["done"]
        self.rows = [row for row in saved["rows"] if row["part"] in self.done]
        self.notes = {**saved["notes"], **self.notes}
        self.skipped = {name: why for name, why in saved["skipped"].items() if name.partition(":")[0] in self.done}
        logger.info("done before: %s", ", ".join(self.done) or "nothing")


class Pooled(nn.Module):
    """An encoder of tiles and the mean of their features, classified."""

    def __init__(self, encoder: nn.Module, features: int = 512) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(features, 2)

    def forward(self, tiles: Tensor, **options: Any) -> Tensor:
        """Logits [1, 2] of tiles [N, 3, S, S]; `options` are the partitioned encoder's."""
        return self.head(self.encoder(tiles, **options).mean(0, keepdim=True))


def random_tiles(machine: Machine, count: int, size_px: int, *, host: bool) -> Tensor:
    """uint8 [count, 3, size_px, size_px]; in pinned host memory, as a loader gives them, or on the device."""
    shape = (count, 3, size_px, size_px)
    tiles = torch.empty(shape, dtype=torch.uint8, pin_memory=machine.gpu) if host else None
    tiles = torch.empty(shape, dtype=torch.uint8, device=machine.device) if tiles is None else tiles
    torch.manual_seed(0)
    for part in tiles.split(1024):
        part.copy_(torch.randint(0, 256, part.shape, dtype=torch.uint8, device=machine.device))
    return tiles


def normaliser(machine: Machine) -> Callable[[Tensor], Tensor]:
    """A function from uint8 pixels to what the encoder takes, of the whole input or of a chunk."""
    return lambda chunk: chunk.to(machine.dtype).sub_(127.5).div_(73.9)
