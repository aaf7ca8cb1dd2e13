"""All that is claimed of the partitioned layers on a GPU, in one run of at most eight minutes.

Exactness first (float64, every mode against native). Then (a) one image of 13,824 px under 24 GiB against native on
the whole card and against mode "paper"; (b) one training step on 32,768 px under 80 GiB and on 65,536 px; (c) bags of
2,048, 12,800 and 41,000 tiles under 24 GiB over the floor: the longer of native's computation of as many tiles, and of
the bytes copied at the link's measured rate, either direction by itself; and the peers of today, see peers_gpu.py.
Images and tiles are uint8, normalised a chunk at a time. Rows are written as they come; what the time does not suffice
for is left out, and the notes say why. Run again with the option resume=yes, it goes on with what is missing.

On a CPU, or with `quick`, the same at sizes that take seconds: a test of this script, whose numbers claim nothing.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.partition.planning.rates import find_rates, probe
from ds_wsi.partition.policy import MODES
from ds_wsi.runtime.log import logger
from launch.benchmarks import peers_gpu
from launch.benchmarks.device_training import DoesNotFitError, Machine, Training, build, find_machine, resnet18
from launch.benchmarks.gpu_bags import bags_part
from launch.benchmarks.gpu_run import GIB, TimeIsUpError, normaliser
from launch.benchmarks.gpu_steps import FULL, QUICK, QUICK_GPU, SizedRun, first_step, fitted, total_memory
from launch.benchmarks.sweep import chunk_of, read_options
from launch.benchmarks.table import Bound, Result

NATIVE_BOUND = 1.3  # (a): seconds over native's on the whole card
PAPER_BOUND = 6.0  # (a): paper's seconds over ours
EXACT_BOUND = 1e-10  # float64: relative difference of gradients
PARTS = ("exact", "image", "large", "bags", "peers", "paper", "largest")


def measure(*, quick: bool, slides: Sequence[str] = (), options: Mapping[str, str] | None = None) -> Result:
    """Measure all parts; small ones where `quick` is given or there is no GPU.

    Args:
        quick: small sizes.
        slides: none are read.
        options: minutes (8), parts (comma-separated, of `PARTS`), dtype (float16, bfloat16, float32), mode (the
            policy's, of (a)'s image: auto), chunk (rows, of "image" and "large"; "auto" lets the planner search, which
            takes minutes), largest_chunk (rows of the last map, of "largest"), host_gib (the budget in host memory; by
            default half of what is free), rows (the file that rows are written to as they come), resume (yes: leave
            out what that file says has been done on this device).

    Raises:
        ValueError: an option is wrong; nothing could be measured.
    """
    del slides
    defaults = {
        "minutes": "8",
        "parts": ",".join(PARTS),
        "dtype": "auto",
        "mode": "",
        "chunk": "",
        "largest_chunk": "",
        "host_gib": "",
        "rows": "runs/partition_gpu_rows.json",
        "resume": "no",
    }
    chosen = read_options(options, defaults)
    deadline = time.monotonic() + 60 * float(chosen["minutes"])
    machine = find_machine(chosen["dtype"], cpu="float32")
    quick = quick or not machine.gpu
    parts = [part.strip() for part in chosen["parts"].split(",")]
    if not set(parts) <= set(PARTS):
        raise ValueError(f"parts must be of {', '.join(PARTS)}, got {chosen['parts']!r}")
    if chosen["resume"] not in ("yes", "no"):
        raise ValueError(f"resume must be yes or no, got {chosen['resume']!r}")
    small = QUICK_GPU if machine.gpu else QUICK
    run = SizedRun(machine, find_rates(machine.device), not quick, Path(chosen["rows"]), deadline)
    run.sizes, run.options = small if quick else FULL, chosen
    precision = "float32" if machine.amp is None else f"autocast to {str(machine.dtype)[6:]}"
    run.notes |= {"device": machine.name, "precision": precision, "quick": quick, "torch": torch.__version__}
    if chosen["resume"] == "yes":
        run.resume()
    missing = [part for part in PARTS if part in parts and part not in run.done]
    if missing and machine.gpu and not (quick and run.rates.measured):
        run.rates = probe(machine.device)
    run.notes["rates"] = asdict(run.rates)
    for name in missing:
        _measured(run, name)
    if not run.rows:
        raise ValueError(f"nothing was measured: {run.skipped}")
    unfinished = sum(part not in run.done for part in parts)
    run.notes |= {"skipped": run.skipped, "seconds": 60 * float(chosen["minutes"]) - run.left}
    bounds = [Bound("parts that failed or that the time did not suffice for", unfinished, 0, at_most=True)]
    bounds += _bounds(run)
    return Result("Partitioned layers on one GPU", run.rows, bounds, lambda figure: _draw(figure, run.rows), run.notes)


def _measured(run: SizedRun, name: str) -> None:
    """Measure one part: one's failure costs no other its numbers."""
    run.skipped.pop(name, None)
    try:
        run.need(0, name)
        _MEASURES[name](run)
        run.done.append(name)
    except DoesNotFitError as error:  # nor will it when it is tried again
        run.skipped[name] = str(error)
        run.done.append(name)
    except TimeIsUpError as error:
        run.skipped[name] = str(error)
    except (RuntimeError, ValueError, MemoryError) as error:
        run.skipped[name] = f"{type(error).__name__}: {(str(error) or 'none').splitlines()[0]}"
    if name in run.skipped:
        logger.warning("%s: %s", name, run.skipped[name])
    run.machine.cap(None)
    run.machine.rest(host=True)
    run.save()


def _bounds(run: SizedRun) -> list[Bound]:
    """Bounds of what was measured at full size; exactness at any."""
    bounds = []
    if "exact" in run.notes:
        worst = max(run.notes["exact"].values())
        bounds.append(Bound(f"gradients within {EXACT_BOUND:g} of native's, float64", worst, EXACT_BOUND, at_most=True))
    bounds += peers_gpu.bounds(run)
    if not run.whole:
        return bounds
    side, cap = run.sizes.image
    ratios = {row["over"]: row["ratio"] for row in run.rows if row["part"] in ("image", "paper") and row["ratio"]}
    if "native" in ratios:
        words = f"{side:,} px under {cap} GiB at most {NATIVE_BOUND} x native on the whole card"
        bounds.append(Bound(words, ratios["native"], NATIVE_BOUND, at_most=True))
    if "planner" in ratios:
        words = f"{side:,} px under {cap} GiB at least {PAPER_BOUND:g} x faster than mode paper"
        bounds.append(Bound(words, ratios["planner"], PAPER_BOUND))
    return bounds


# ------------------------------------------------------------------------------------------------ images


def _image(machine: Machine, side: int, cap: float | None) -> Tensor:
    """uint8 [1, 3, side, side], made in bands; in host memory where it is more than a quarter of the cap."""
    size = 3 * side * side
    host = size > (total_memory(machine) if cap is None else cap * GIB) / 4
    where: dict[str, Any] = {"pin_memory": machine.gpu} if host else {"device": machine.device}
    image = torch.empty(1, 3, side, side, dtype=torch.uint8, **where)  # page-locked: copied ahead of its use
    torch.manual_seed(0)
    for first in range(0, side, 1024):
        band = (1, 3, min(1024, side - first), side)
        image[:, :, first : first + 1024] = torch.randint(0, 256, band, dtype=torch.uint8, device=machine.device)
    return image


def _planner(
    run: SizedRun, image: Tensor, cap: float | None, *, chunk: int | None, search: str = "auto"
) -> tuple[Training, float]:
    """Our training, fitted into the cap (GiB) with less and less of it as the budget, and its first step's seconds."""

    def attempt(budget: int) -> tuple[Training, float]:
        training = build(
            run.machine,
            "planner",
            image,
            max(1, budget - run.machine.resident(resnet18(run.machine))),
            chunk=chunk,
            prepare=normaliser(run.machine),
            rates=run.rates,
            search=search,
        )
        return training, first_step(run, training, budget)

    return fitted(run, cap, attempt, f"{image.shape[2]} px")


def _image_part(run: SizedRun) -> None:
    """(a) against native: the two in turn, three times, each after a step that is not timed."""
    machine, (side, cap) = run.machine, run.sizes.image
    image = _image(machine, side, cap)
    # A small image fits as it is: what is tested there is a partition.
    search = run.options["mode"] or ("auto" if run.whole else "lean")
    planner, _ = _planner(run, image, cap, chunk=chunk_of(run.options["chunk"], side), search=search)
    native: Training | None = build(machine, "native", image, None, prepare=normaliser(machine))
    seconds: dict[str, list[float]] = {"planner": [], "native": []}
    for _ in range(3):
        _turn(machine, planner, cap, seconds["planner"])
        try:
            if native:
                _turn(machine, native, None, seconds["native"])
        except DoesNotFitError as error:
            run.skipped["image: native"] = str(error)
            native = None
    common = {"part": "image", "case": f"{side} px"}
    if native:
        if not machine.gpu:
            native.count(2**62)
        run.row(native, **common, mode="native", seconds=median(seconds["native"]))
    took = median(seconds["planner"])
    compared = {"ratio": took / median(seconds["native"]), "over": "native"} if native else {}
    run.row(planner, **common, mode="planner", cap_gib=cap, seconds=took, **compared)


def _turn(machine: Machine, training: Training, cap: float | None, seconds: list[float]) -> None:
    machine.rest()
    machine.cap(None if cap is None else cap * GIB)
    if machine.gpu:
        training.step()  # the allocator's and cuDNN's
    seconds.append(training.step())


def _paper_part(run: SizedRun) -> None:
    """(a) against mode "paper": one step, and a second one, which then counts alone, if the time suffices."""
    machine, (side, cap) = run.machine, run.sizes.image
    image = _image(machine, side, cap)
    machine.cap(None if cap is None else cap * GIB)
    training, seconds = _paper(run, image, int((cap or 1) * GIB))
    warm = run.left > 1.3 * seconds
    if warm:
        seconds = training.step()
    run.notes["paper's step"] = "the second" if warm else "the first"
    planner_seconds = [row["seconds"] for row in run.rows if row["part"] == "image" and row["mode"] == "planner"]
    compared = {"ratio": seconds / planner_seconds[0], "over": "planner"} if planner_seconds else {}
    run.row(training, part="paper", case=f"{side} px", mode="paper", cap_gib=cap, seconds=seconds, **compared)


def _paper(run: SizedRun, image: Tensor, cap_bytes: int) -> tuple[Training, float]:
    """Mode "paper" with fewer and fewer maps on the card until it fits, and its first step's seconds.

    The largest maps there are of 1/32 of the cap at first: with those of 1/8 a ResNet-18 keeps all of layer1 there.
    """
    reason = "nothing was tried"
    for power in range(2, 10) if run.machine.gpu else (20,):
        run.need(60, 'a step of mode "paper"')
        try:
            return _paper_once(run.machine, image, cap_bytes >> power)
        except DoesNotFitError as error:
            reason = str(error)
            logger.warning("paper, 1/%d of the cap: %s", 2**power, reason)
        run.machine.rest()
    raise DoesNotFitError(reason)


def _paper_once(machine: Machine, image: Tensor, budget: int) -> tuple[Training, float]:
    training = build(machine, "paper", image, max(1, budget), prepare=normaliser(machine))
    training.count(0, refuse=False)
    return training, training.step()


def _large_part(run: SizedRun) -> None:
    """(b), the first image: the planner's choice."""
    side, _ = run.sizes.large
    run.need(45, f"{side} px")
    _one_step(run, "large", run.sizes.large, chunk=chunk_of(run.options["chunk"], side, most=1024), search="auto")


def _largest_part(run: SizedRun) -> None:
    """(b), the second: even the first map is larger than the card, so everything is recomputed, from the image."""
    side, _ = run.sizes.largest
    run.need(45, f"{side} px")
    chunk = int(run.options["largest_chunk"] or (128 if run.whole else 4))
    _one_step(run, "largest", run.sizes.largest, chunk=chunk, search="recompute")


def _one_step(run: SizedRun, part: str, size: tuple[int, float | None], *, chunk: int | None, search: str) -> None:
    side, cap = size
    image = _image(run.machine, side, cap)
    training, seconds = _planner(run, image, cap, chunk=chunk, search=search)
    run.notes[f"{part}: first step"] = seconds
    if seconds < 10 and run.left > 30:
        seconds = training.step()
    run.notes[f"{part}: loss"] = training.loss
    run.notes[f"{part}: image on"] = image.device.type
    run.row(training, part=part, case=f"{side} px", mode="planner", cap_gib=cap, seconds=seconds)


def _peers_part(run: SizedRun) -> None:
    for case in peers_gpu.cases(whole=run.whole):
        peers_gpu.compare(run, case)


# --------------------------------------------------------------------------------------------- exactness


def _exact_part(run: SizedRun) -> None:
    """Every mode's gradients against native's in float64, on one image."""
    side = run.sizes.exact
    machine = Machine(run.machine.device, torch.float32)  # no autocast
    torch.manual_seed(1)
    image = torch.randn(1, 3, side, side, dtype=torch.float64, device=machine.device)
    expected, differences = _gradients(machine, image, None), {}
    for mode in MODES:
        gradients = _gradients(machine, image, mode)
        pairs = zip(gradients, expected, strict=True)
        differences[mode] = max(((one - two).abs().max() / two.abs().max()).item() for one, two in pairs)
        machine.rest(host=True)
    run.notes["exact"] = differences
    worst = max(differences.values())
    run.row(None, part="exact", case=f"{side} px, float64", mode="all", ratio=worst, over="largest gradient")


def _gradients(machine: Machine, image: Tensor, mode: str | None) -> list[Tensor]:
    model = resnet18(machine).double()
    if mode:
        partition_layers(model, PartitionPolicy(mode=mode, axis="spatial", chunk_size=8), check=False)
    model(image).square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def _draw(figure: Figure, rows: Sequence[dict[str, Any]]) -> None:
    """Seconds and peak memory of every case."""
    shown = [row for row in rows if row["seconds"] is not None][::-1]
    left, right = figure.subplots(1, 2, sharey=True)
    names = [f"{row['case']}, {row['mode']}" for row in shown]
    for axes, key, label in ((left, "seconds", "seconds per step"), (right, "peak_gib", "peak memory, GiB")):
        colors = ["#3b6ea5" if row["mode"].startswith(("planner", "ours")) else "#888888" for row in shown]
        axes.barh(names, [row[key] or 0.0 for row in shown], color=colors)
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.tick_params(labelsize=7)


_MEASURES: dict[str, Callable[[SizedRun], None]] = {
    "exact": _exact_part,
    "image": _image_part,
    "large": _large_part,
    "bags": bags_part,
    "peers": _peers_part,
    "paper": _paper_part,
    "largest": _largest_part,
}
