"""How training on one bag scales with the ranks that share it: measured here, simulated beyond.

Measured: the step's time by exchange on two ranks of one thread each, beside one process of one thread; the paper's
layout, in which the first rank has the aggregator and no tiles; bytes exchanged; peak memory by the bag's length.
Simulated up to 512 ranks: measured times per tile and per instance, and a model of the link.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from ds_wsi.bags.sampler import share_tiles
from ds_wsi.models import SlideModel, build_aggregator
from ds_wsi.models.aggregators.abmil import GatedABMIL
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.memory import ByteMeter
from ds_wsi.stacking.stacked_bags import stack_bags
from ds_wsi.tile_parallel import TileMesh, TileParallelPolicy, shard_tiles, stream_bag, tile_mesh
from launch.benchmarks.ranks import run_ranks
from launch.benchmarks.table import Bound, Result

LAYOUTS = {
    "sharded": ("sharded", (1.0, 1.0)),
    "replicated": ("replicated", (1.0, 1.0)),
    "gather": ("gather", (1.0, 1.0)),
    "gather, no tiles on the first rank (the paper's)": ("gather", (0.0, 1.0)),
}
LENGTHS = (1_000, 4_000, 10_000, 40_000)
COLORS = {"sharded": "#3b6ea5", "replicated": "#5aa469", "gather": "#c4713b"}
RANKS = tuple(2**power for power in range(10))
ALIVE = 0.5  # of ideal: below it an exchange no longer scales


@dataclass(frozen=True)
class Link:
    """A network between GPUs.

    Args:
        latency_s: the latency of one message.
        bandwidth: bytes per second and rank, in one direction.
    """

    latency_s: float = 2e-5
    bandwidth: float = 2.5e10


@dataclass(frozen=True)
class Costs:
    """What one training step costs on one device.

    Args:
        tile_s: forward and backward of the encoder, per tile.
        instance_s: forward and backward of the aggregator, per instance.
        width: the features' width.
        gradient_bytes: bytes of the gradients of all parameters, which an engine reduces whatever the exchange.
    """

    tile_s: float
    instance_s: float
    width: int
    gradient_bytes: int


def measure(*, quick: bool, slides: Sequence[str], options: Mapping[str, str]) -> Result:
    """Measure on two ranks, then simulate.

    Args:
        quick: fewer repeats.
        slides: not read.
        options: tiles, tile_px, repeats of the measurement; bag_tiles, latency_us, bandwidth_gb of the simulation, and
            tile_ms of an accelerator that is assumed.

    Raises:
        ValueError: an unknown option.
    """
    defaults = {"tiles": 256, "tile_px": 96, "repeats": 5 if quick else 9, "bag_tiles": 12_800}
    model_options = {"latency_us": 20.0, "bandwidth_gb": 25.0, "tile_ms": 0.5}
    unknown = [name for name in options if name not in (*defaults, *model_options)]
    if unknown:
        raise ValueError(f"--option must be one of {', '.join((*defaults, *model_options))}, got {unknown[0]!r}")
    number = {name: int(options.get(name, value)) for name, value in defaults.items()}
    link = Link(
        float(options.get("latency_us", model_options["latency_us"])) * 1e-6,
        float(options.get("bandwidth_gb", model_options["bandwidth_gb"])) * 1e9,
    )
    steps = run_ranks(_measure_steps, 2, number["tiles"], number["tile_px"], number["repeats"])[0]
    rows = _measured_rows(steps)
    peaks = {length: peak_bytes(length) for length in LENGTHS}
    rows += [
        _row(f"peak bytes, streamed bag of {n:,} tiles", 1, 0.0, size / peaks[LENGTHS[0]], size)
        for n, size in peaks.items()
    ]
    costs = Costs(steps["tile_s"], steps["instance_s"], int(steps["width"]), int(steps["gradient_bytes"]))
    # An accelerator that takes this long per tile, its aggregator faster by the same factor: assumed, not measured.
    tile_s = float(options.get("tile_ms", model_options["tile_ms"])) * 1e-3
    assumed = replace(costs, tile_s=tile_s, instance_s=costs.instance_s * tile_s / costs.tile_s)
    devices = {"this machine's tiles": costs, f"{tile_s * 1e3:g} ms per tile": assumed}
    curves = {
        (name, device): [simulate(name, ranks, number["bag_tiles"], device_costs, link) for ranks in RANKS]
        for device, device_costs in devices.items()
        for name in COLORS
    }
    for (name, device), curve in curves.items():
        for ranks, (seconds, efficiency, size) in zip(RANKS, curve, strict=True):
            what = f"simulated, {name}, {number['bag_tiles']:,} tiles, {device}"
            rows.append(_row(what, ranks, seconds, efficiency, size))
    last = {f"{name}, {device}": _last_alive(curve) for (name, device), curve in curves.items()}
    for name, ranks in last.items():
        logger.info("%s: %.0f%% of ideal up to %d ranks", name, 100 * ALIVE, ranks)
    notes = {**number, "link": vars(link), f"ranks at {ALIVE:.0%} of ideal": last}
    notes["costs"] = {device: vars(device_costs) for device, device_costs in devices.items()}
    return Result(
        "Scaling of one bag over ranks", rows, _bounds(steps, peaks), lambda figure: _draw(figure, curves, steps), notes
    )


def _row(what: str, ranks: int, seconds: float, ratio: float, size: float) -> dict[str, Any]:
    return {"what": what, "ranks": ranks, "seconds": seconds, "ratio": ratio, "bytes": size}


# ------------------------------------------------------------------------------------------------ measured


def _make_model() -> SlideModel:
    torch.manual_seed(0)
    encoder = timm.create_model("resnet18", num_classes=0)
    return SlideModel(encoder, build_aggregator("gated_abmil", encoder.num_features, 2)).train()


def _measure_steps(count: int, tile_px: int, repeats: int) -> dict[str, float]:
    """Medians over steps that take turns: alone on the first rank while the second waits, then each layout on both."""
    tiles = torch.rand(count, 3, tile_px, tile_px)
    mesh = tile_mesh(2)
    alone = _make_model()
    shared = {}
    for name, (exchange, shares) in LAYOUTS.items():
        model = _make_model()
        handle = shard_tiles(model, mesh, TileParallelPolicy(2, exchange))
        start, stop = share_tiles([count], shares)[mesh.tile_rank][0]
        shared[name] = model, handle, tiles[start:stop]
    times: dict[str, list[float]] = {name: [] for name in ("alone", *shared)}
    for repeat in range(repeats + 1):  # the first warms up
        dist.barrier()
        if mesh.tile_rank == 0:
            times["alone"].append(_timed_step(alone, tiles, TileMesh()))
        dist.barrier()
        for name, (model, handle, rank_tiles) in shared.items():
            if handle.forward is not None and repeat == repeats:
                handle.forward.traffic.clear()
            dist.barrier()
            times[name].append(_timed_step(model, rank_tiles, mesh))
    measured = {f"seconds {name}": median(values[1:]) for name, values in times.items() if values}
    for name, (_, handle, _) in shared.items():
        assert handle.forward is not None
        n_bytes = torch.tensor(float(sum(handle.forward.traffic.bytes.values())))
        dist.all_reduce(n_bytes)
        measured[f"bytes {name}"] = float(n_bytes)
    features = torch.randn(count, int(alone.encoder.num_features))  # type: ignore[arg-type]
    measured["instance_s"] = median(_timed_pooling(alone.aggregator, features) for _ in range(repeats)) / count
    measured["tile_s"] = measured.get("seconds alone", 0.0) / count - measured["instance_s"]
    measured["width"] = float(features.shape[1])
    measured["gradient_bytes"] = float(sum(p.numel() * p.element_size() for p in alone.parameters()))
    return measured


def _timed_step(model: SlideModel, tiles: Tensor, mesh: TileMesh) -> float:
    """Forward, backward and the gradients' all-reduce, as plain as DDP's: one flat buffer."""
    model.zero_grad()
    start = time.perf_counter()
    loss = F.cross_entropy(model(stack_bags([tiles], allow_empty=True)).logits, torch.tensor([1]))
    (loss / mesh.tile_size).backward()
    if mesh.group is not None:
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        dist.all_reduce(flat, group=mesh.group)
    return time.perf_counter() - start


def _timed_pooling(aggregator: nn.Module, features: Tensor) -> float:
    start = time.perf_counter()
    aggregator(stack_bags([features.requires_grad_()])).logits.sum().backward()
    return time.perf_counter() - start


def _measured_rows(measured: dict[str, float]) -> list[dict[str, Any]]:
    alone = measured["seconds alone"]
    rows = [_row("one process, one thread", 1, alone, 1.0, 0)]
    for name in LAYOUTS:
        seconds = measured[f"seconds {name}"]
        rows.append(_row(name, 2, seconds, alone / seconds, measured[f"bytes {name}"]))
        logger.info("%s: %.3f s on two ranks, %.2f x one process's speed", name, seconds, alone / seconds)
    return rows


def peak_bytes(count: int, chunk_size: int = 64) -> int:
    """Peak bytes that a streamed training step on `count` tiles allocates, with a small encoder."""
    torch.manual_seed(0)
    encoder = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2), nn.GroupNorm(2, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    )
    aggregator = GatedABMIL(16, 2)
    tiles = torch.zeros(1, 3, 32, 32, dtype=torch.uint8).expand(count, -1, -1, -1)
    with ByteMeter() as meter:
        out = stream_bag(encoder, aggregator, tiles, chunk_size=chunk_size, prepare=lambda chunk: chunk.float() / 255)
        out.logits.sum().backward()
    return meter.peak


# ------------------------------------------------------------------------------------------------ simulated


def simulate(exchange: str, ranks: int, tiles: int, costs: Costs, link: Link) -> tuple[float, float, float]:
    """A step's seconds, its share of ideal speed-up, and the bytes that the busiest rank exchanges.

    Ring collectives of b bytes over T ranks: an all-reduce takes 2 (T - 1) / T b / bandwidth and 2 log2 T latencies
    (trees, for small ones), an all-gather or reduce-scatter half of it. "gather" is the paper's: the first rank has the
    aggregator and no tiles, all features and gradients pass its link.
    """
    one = tiles * (costs.tile_s + costs.instance_s)
    if ranks == 1:
        return one, 1.0, 0.0
    features = tiles * costs.width * 4
    ring, hops = (ranks - 1) / ranks / link.bandwidth, math.ceil(math.log2(ranks)) * link.latency_s
    gradients = 2 * costs.gradient_bytes * ring + 2 * hops
    if exchange == "sharded":
        size = 4 * (1 + 2 * (costs.width + 1))  # maxima, sums, and the sums' gradients
        compute_s = math.ceil(tiles / ranks) * (costs.tile_s + costs.instance_s)
        seconds = compute_s + 2 * size * ring + 3 * 2 * hops
    elif exchange == "replicated":
        size = 2 * features
        seconds = math.ceil(tiles / ranks) * costs.tile_s + tiles * costs.instance_s + size * ring + 2 * hops
    else:
        size = 2 * features
        encoders = math.ceil(tiles / (ranks - 1)) * costs.tile_s
        seconds = encoders + tiles * costs.instance_s + size / link.bandwidth + 2 * link.latency_s
    seconds += gradients
    return seconds, one / seconds / ranks, float(size)


def _last_alive(curve: Sequence[tuple[float, float, float]]) -> int:
    return max(ranks for ranks, (_, efficiency, _) in zip(RANKS, curve, strict=True) if efficiency >= ALIVE)


def _bounds(measured: dict[str, float], peaks: dict[int, int]) -> list[Bound]:
    speed = measured["seconds alone"] / measured["seconds sharded"]
    paper = measured["seconds gather, no tiles on the first rank (the paper's)"] / measured["seconds sharded"]
    flat = peaks[LENGTHS[-1]] / peaks[LENGTHS[0]]
    return [
        Bound("sharded on two ranks of one thread at least 1.7 x one process of one thread", speed, 1.7),
        Bound("sharded at least as fast as the paper's layout on as many ranks", paper, 1.0),
        Bound(f"peak memory of {LENGTHS[-1]:,} tiles at most 1.1 x that of {LENGTHS[0]:,}", flat, 1.1, at_most=True),
    ]


def _draw(
    figure: Figure, curves: dict[tuple[str, str], list[tuple[float, float, float]]], measured: dict[str, float]
) -> None:
    left, right = figure.subplots(1, 2)
    first = next(iter(curves))[1]
    for (name, device), curve in curves.items():
        style = "--" if device == first else "-"
        efficiency = [share for _, share, _ in curve]
        left.plot(RANKS, efficiency, style, color=COLORS[name], marker=".", label=f"{name}, {device}")
    left.axhline(ALIVE, color="#999999", linewidth=0.6)
    left.set_xscale("log", base=2)
    left.set_ylim(0, 1.05)
    left.set_xlabel("ranks that share a bag (simulated)")
    left.set_ylabel("share of ideal speed-up")
    left.legend(fontsize=6)
    names = [name.split(",")[0] + (", paper's" if "paper" in name else "") for name in LAYOUTS]
    speeds = [measured["seconds alone"] / measured[f"seconds {name}"] for name in LAYOUTS]
    right.barh(names[::-1], speeds[::-1], color="#3b6ea5")
    right.axvline(2, color="#999999", linewidth=0.6)
    right.set_xlabel("speed of two ranks over one (measured)")
