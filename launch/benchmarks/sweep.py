"""The Big-Layers paper's Figure 2: one ResNet-18 training step on one image of growing side, under a cap of memory.

Each method tries more and more until it fits: the planner with less and less of the cap as its budget, mode "paper"
with more and more of its maps in host memory. The methods take their steps in turn, repeat by repeat, so that a machine
whose speed drifts slows all of them; ratios are of medians, against native where native fits.

On a GPU the allocator is capped, and what runs out of memory does not fit. On a CPU the tensors of forward and backward
are counted instead (parameters, their optimizer's state and the image are not), and what exceeds the cap does not fit.
Mode "paper" is there given all its maps in host memory, which is the CPU's too: they are counted, and it fits.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ds_wsi.partition.planning.rates import Rates, probe
from ds_wsi.runtime.log import logger
from launch.benchmarks.device_training import (
    DoesNotFitError,
    Machine,
    Training,
    build,
    find_machine,
    resnet18,
)
from launch.benchmarks.table import Result

MODES = ("native", "planner", "paper")
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)  # of the cap, the planner's budget: what an allocator wastes is not planned
PAPER_SHARES = tuple(0.5**power for power in range(9))  # of the cap: an eighth of it is the largest map on the GPU
COLORS = {"native": "#888888", "planner": "#3b6ea5", "paper": "#c4713b"}


@dataclass
class _Setting:
    machine: Machine
    sides: list[int]
    modes: list[str]
    cap_bytes: int
    repeats: int
    warmups: int
    chunk: str
    minutes: float
    rates: Rates | None
    levels: dict[str, int]  # of SHARES and PAPER_SHARES: a larger image fits with no more than a smaller one


def measure(*, quick: bool, slides: Sequence[str] = (), options: Mapping[str, str] | None = None) -> Result:
    """Measure every side in every mode.

    Args:
        quick: sides of 256 to 512 px, one warm-up, three repeats.
        slides: none are read.
        options: sides (comma-separated), cap_gib, repeats, warmups, modes (comma-separated), dtype (float16, bfloat16,
            float32), chunk (rows of a chunk; "auto" lets the planner search, which takes minutes a side), minutes
            (after which no further side is begun).
    """
    del slides
    setting = _setting(quick, options)
    machine = setting.machine
    start, rows, skipped = time.monotonic(), [], {}
    machine.cap(setting.cap_bytes)
    try:
        for side in setting.sides:
            if time.monotonic() - start > 60 * setting.minutes:
                skipped[str(side)] = f"{setting.minutes:g} minutes were up"
                continue
            rows += _side(setting, side)
    finally:
        machine.cap(None)
    notes = {
        "device": machine.name,
        "precision": "float32, no autocast" if machine.amp is None else f"autocast to {str(machine.dtype)[6:]}",
        "cap_bytes": setting.cap_bytes,
        "repeats": setting.repeats,
        "warmups": setting.warmups,
        "peak": "active on the GPU" if machine.gpu else "counted tensors of forward and backward, paper's maps too",
        "skipped": skipped,
    }
    title = f"A ResNet-18 training step on one image, at most {setting.cap_bytes / 2**30:.3g} GiB"
    return Result(title, rows, [], lambda figure: draw(figure, rows, setting.cap_bytes), notes)


def read_options(options: Mapping[str, str] | None, defaults: Mapping[str, str]) -> dict[str, str]:
    """The options, the defaults where they say nothing.

    Raises:
        ValueError: there is no such option.
    """
    unknown = sorted(set(options or {}) - set(defaults))
    if unknown:
        raise ValueError(f"an option must be one of {', '.join(defaults)}, got {unknown[0]!r}")
    return {**defaults, **(options or {})}


def _setting(quick: bool, options: Mapping[str, str] | None) -> _Setting:
    gpu = torch.cuda.is_available()
    defaults = {
        "sides": "256,384,512" if quick else ",".join(map(str, range(7_680, 13_825, 256))),
        "cap_gib": "24" if gpu and not quick else "0.08",
        "repeats": "3" if quick else "10",
        "warmups": "1" if quick else "5",
        "modes": ",".join(MODES),
        "dtype": "auto",
        "chunk": "",
        "minutes": "inf",
    }
    if gpu and quick:
        defaults["cap_gib"] = "1"
    chosen = read_options(options, defaults)
    modes = [mode.strip() for mode in chosen["modes"].split(",")]
    if not set(modes) <= set(MODES):
        raise ValueError(f"modes must be of {', '.join(MODES)}, got {chosen['modes']!r}")
    machine = find_machine(chosen["dtype"], cpu="bfloat16")
    return _Setting(
        machine=machine,
        sides=[int(side) for side in chosen["sides"].split(",")],
        modes=modes,
        cap_bytes=int(float(chosen["cap_gib"]) * 2**30),
        repeats=max(1, int(chosen["repeats"])),
        warmups=int(chosen["warmups"]),
        chunk=chosen["chunk"],
        minutes=float(chosen["minutes"]),
        rates=probe(machine.device) if machine.gpu else None,
        levels=dict.fromkeys(MODES, 0),
    )


def _side(setting: _Setting, side: int) -> list[dict[str, Any]]:
    """Every mode on an image of this side, their repeats in turn."""
    machine = setting.machine
    machine.rest(host=True)
    image = torch.rand(1, 3, side, side, device=machine.device)
    trainings: dict[str, Training] = {}
    seconds: dict[str, list[float]] = {mode: [] for mode in setting.modes}
    reasons: dict[str, str] = {}
    for mode in setting.modes:
        try:
            trainings[mode] = _fitted(setting, mode, image)
        except DoesNotFitError as error:
            reasons[mode] = str(error)
    for _ in range(setting.repeats):
        for mode in list(trainings):
            try:
                if machine.gpu and mode != "paper" and len(trainings) > 1:
                    machine.rest()  # one mode's cached blocks fragment the next one's
                    trainings[mode].step()
                seconds[mode].append(trainings[mode].step())
            except DoesNotFitError as error:
                reasons[mode] = str(error)
                del trainings[mode]
    rows = []
    for mode in setting.modes:
        training = trainings.get(mode)
        took = median(seconds[mode]) if training else None
        row = {
            "side": side,
            "mode": mode,
            "seconds": took,
            "peak bytes": training.peak_bytes if training else None,
            "fits": "yes" if training else "no",
            "ratio": took / median(seconds["native"]) if took and "native" in trainings else None,
            "plan": _describe(training) if training else "",
            "why": reasons.get(mode, ""),
        }
        logger.info("%s", row)
        rows.append(row)
    return rows


def _fitted(setting: _Setting, mode: str, image: Tensor) -> Training:
    """A training that has taken its warm-ups.

    Raises:
        DoesNotFitError: nothing that is tried fits.
    """
    machine = setting.machine
    shares = {"planner": SHARES, "paper": PAPER_SHARES}.get(mode, (1.0,))
    if not machine.gpu:
        shares = {"planner": (1.0, *SHARES), "paper": PAPER_SHARES[-1:]}.get(mode, (1.0,))
    reason = "nothing was tried"
    while setting.levels[mode] < len(shares):
        try:
            return _attempt(setting, mode, image, int(shares[setting.levels[mode]] * setting.cap_bytes))
        except DoesNotFitError as error:
            reason = str(error)
        machine.rest(host=True)
        setting.levels[mode] += 1
    setting.levels[mode] = len(shares) - 1  # the next side says so itself
    raise DoesNotFitError(reason)


def _attempt(setting: _Setting, mode: str, image: Tensor, budget: int) -> Training:
    machine = setting.machine
    if mode == "planner":
        budget -= machine.resident(resnet18(machine))
        if budget < 1:
            raise DoesNotFitError("the image and the parameters alone exceed the cap")
    chunk = chunk_of(setting.chunk, image.shape[2])
    training = build(machine, mode, image, budget, chunk=chunk, rates=setting.rates)
    training.count(setting.cap_bytes, refuse=mode != "paper")
    for _ in range(max(1, setting.warmups) if machine.gpu else setting.warmups):
        training.step()
    return training


def chunk_of(option: str, side: int, most: int = 512) -> int | None:
    """Rows a chunk: as the option says, else about an eighth of the image and at most `most`; None for "auto"."""
    if option == "auto":
        return None
    return int(option) if option else max(8, min(most, 2 ** ((side // 8).bit_length() - 1)))


def _describe(training: Training) -> str:
    plan = training.plan
    if plan is None or plan.mode != "partitioned":
        return "" if plan is None else plan.mode
    return " ".join(segment.mode for segment in plan.segments)


def draw(figure: Figure, rows: Sequence[dict[str, Any]], cap_bytes: int) -> None:
    """Seconds and peak bytes over the side; what does not fit has no point."""
    left, right = figure.subplots(1, 2)
    for mode in MODES:
        points = [row for row in rows if row["mode"] == mode and row["fits"] == "yes"]
        style: dict[str, Any] = {"color": COLORS[mode], "marker": "o", "markersize": 3, "label": mode}
        left.plot([row["side"] for row in points], [row["seconds"] for row in points], **style)
        right.plot([row["side"] for row in points], [row["peak bytes"] / 2**30 for row in points], **style)
    right.axhline(cap_bytes / 2**30, color="black", linewidth=1, linestyle="--", label="cap")
    left.set_yscale("log")
    for axes, label in ((left, "seconds per step (median)"), (right, "peak memory, GiB")):
        axes.set_xlabel("side of the image, px")
        axes.set_ylabel(label)
        axes.legend(fontsize=8)
