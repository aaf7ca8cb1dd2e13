"""Reading tiles: OpenSlide directly, against ours with 1 and 2 workers; and memory over many slides.

The three are timed in turn, repeat by repeat, so that a machine whose speed drifts slows all of them; what is compared
is the median of the repeats' ratios. A worker's rate leaves out its start: a training run starts its workers once.
"""

import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import openslide
import psutil
import torch
from matplotlib.figure import Figure

from ds_wsi.bags.bag import read_chunks
from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.runtime.log import logger
from ds_wsi.slides.demo import DemoPolicy, make_demo
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.slides.pyramid import write_pyramid
from ds_wsi.slides.slide import Slide
from ds_wsi.slides.tiling import TileGrid, plan_coords, plan_level
from launch.benchmarks.table import Bound, Result

RATE_BOUND = 0.9
MEMORY_BOUND = 1.1  # peak over the second half of the slides, over the peak of the first


def measure(*, quick: bool, slides: Sequence[str], options: Mapping[str, str] | None = None) -> Result:
    """Measure the reading of slides; `slides` names files to read beside the demo's and a synthetic JPEG one."""
    del options
    torch.set_num_threads(1)
    folder = Path("runs/benchmark_slides")
    demo = make_demo(folder / "demo", DemoPolicy(train=4, validation=2, test=2))
    cases = [
        ("demo, 64 px", demo.parent / "slides" / "demo_002.tiff", 64),
        ("JPEG 4,096 px, 256 px", large_slide(folder / "large.tiff"), 256),
        *((f"{Path(name).name}, 256 px", Path(name), 256) for name in slides),
    ]
    repeats = 5 if quick else 11
    rows = [row for name, path, size in cases for row in _rates(name, path, size, repeats)]
    memory = _memory_over_slides(demo.parent, 50)
    bounds = [
        Bound(f"{row['slide']}: {row['reader']} at least {RATE_BOUND} of OpenSlide a worker", row["ratio"], RATE_BOUND)
        for row in rows
        if row["reader"] != "OpenSlide"
    ]
    half = len(memory) // 2
    growth = max(memory[half:]) / max(memory[:half])
    bounds.append(Bound(f"memory over 50 slides flat within {MEMORY_BOUND}", growth, MEMORY_BOUND, at_most=True))
    notes = {"repeats": repeats, "memory_bytes": memory, "processors": os.cpu_count()}
    return Result("Tiles read a second", rows, bounds, lambda figure: _draw(figure, rows, memory), notes)


def large_slide(path: Path) -> Path:
    """A synthetic JPEG slide of 4,096 px, drawn once."""
    if not path.exists():
        noise = np.random.default_rng(0).integers(90, 220, (1024, 1024, 3), dtype=np.uint8)
        write_pyramid(path, noise.repeat(4, axis=0).repeat(4, axis=1), mpp=0.5)
    return path


def _rates(name: str, path: Path, size: int, repeats: int) -> list[dict[str, Any]]:
    grid = whole_grid(path, size)
    # Some seconds a repeat: in a shorter one the last chunks, when a worker has run out of work, would count too much.
    passes = math.ceil((24_000 if size < 256 else 3_000) / len(grid))
    readers = {
        "OpenSlide": lambda: _openslide_rate(path, grid, passes),
        "ours, 1 worker": lambda: _our_rate(path, grid, passes, 1),
        "ours, 2 workers": lambda: _our_rate(path, grid, passes, 2) / 2,
    }
    rates: dict[str, list[float]] = {reader: [] for reader in readers}
    for _ in range(repeats):
        for reader, rate in readers.items():
            rates[reader].append(rate())
    plain = rates["OpenSlide"]
    rows = []
    for reader, reader_rates in rates.items():
        ratio = median(reader_rate / plain_rate for reader_rate, plain_rate in zip(reader_rates, plain, strict=True))
        logger.info("%s, %s: %.0f tiles/s a worker, %.3f of OpenSlide", name, reader, median(reader_rates), ratio)
        rows.append({"slide": name, "reader": reader, "tiles/s a worker": median(reader_rates), "ratio": ratio})
    return rows


def whole_grid(path: Path, size: int) -> TileGrid:
    """Every whole tile of level 0, tissue or not: what is timed is reading."""
    with Slide(path, mpp=0.5) as slide:
        plan = plan_level(slide.mpp, slide.level_downsamples, slide.mpp, size)
        coords = plan_coords(slide.bounds, plan.tile_size_level0_px)
        return TileGrid(
            slide_id=path.stem,
            coords=coords,
            tile_size_px=size,
            tile_size_level0_px=plan.tile_size_level0_px,
            level=plan.level,
            read_size_px=plan.read_size_px,
            mpp=slide.mpp,
            slide_mpp=slide.mpp,
            slide_width_px=slide.width_px,
            slide_height_px=slide.height_px,
            policy=TilingPolicy(tile_size_px=size, mpp=slide.mpp),
        )


def _openslide_rate(path: Path, grid: TileGrid, passes: int) -> float:
    """Tiles a second of the loop that everybody writes first: read_region, RGB, array."""
    start = time.perf_counter()
    for _ in range(passes):
        with openslide.OpenSlide(str(path)) as slide:
            # The same cache as ours: OpenSlide's default differs from version to version.
            slide.set_cache(openslide.OpenSlideCache(2**25))
            for x, y in grid.coords.tolist():
                np.asarray(slide.read_region((x, y), grid.level, (grid.read_size_px,) * 2).convert("RGB"))
    return passes * len(grid) / (time.perf_counter() - start)


def _our_rate(path: Path, grid: TileGrid, passes: int, workers: int) -> float:
    """Tiles a second through worker processes, from the first chunk to the last."""
    # Each pass is a slide of its own, as in a cohort: opened anew, nothing cached.
    slides = [SlideEntry(f"{path.stem}_{index}", path, 0, "", mpp=0.5) for index in range(passes)]
    policy = ReadPolicy(workers=workers, open_slides=1)
    stream = read_chunks(slides, [grid] * passes, range(passes), policy)
    # A worker's first chunk ends its start; of what follows, at most the part of a chunk is read before the clock runs.
    for _ in range(workers):
        next(stream)
    start = time.perf_counter()
    tiles = sum(len(chunk.tiles) for chunk in stream)
    return tiles / (time.perf_counter() - start)


def _memory_over_slides(folder: Path, n_slides: int) -> list[int]:
    """Resident bytes of this process and its workers after each of many slides (the demo's, in turn)."""
    paths = sorted((folder / "slides").glob("*.tiff"))
    slides = [SlideEntry(f"slide_{index}", paths[index % len(paths)], 0, "", mpp=0.5) for index in range(n_slides)]
    grids = [whole_grid(slide.path, 64) for slide in slides]
    process, resident_bytes = psutil.Process(), []
    for chunk in read_chunks(slides, grids, range(n_slides), ReadPolicy(workers=1, open_slides=4)):
        if chunk.request.last:
            family = [process, *process.children(recursive=True)]
            resident_bytes.append(sum(member.memory_info().rss for member in family))
    return resident_bytes


def _draw(figure: Figure, rows: Sequence[dict[str, Any]], memory: Sequence[int]) -> None:
    bars, line = figure.subplots(1, 2)
    our_rows = [row for row in rows if row["reader"] != "OpenSlide"]
    bars.barh(
        [f"{row['slide']}\n{row['reader']}" for row in our_rows], [row["ratio"] for row in our_rows], color="#3b6ea5"
    )
    bars.axvline(RATE_BOUND, color="black", linewidth=1, linestyle="--")
    bars.set_xlabel("rate a worker over OpenSlide's")
    bars.tick_params(labelsize=7)
    line.plot(range(1, len(memory) + 1), [value / 2**20 for value in memory], color="#3b6ea5")
    line.set_ylim(0, 1.15 * max(memory) / 2**20)
    line.set_xlabel("slides read")
    line.set_ylabel("resident memory, MiB")
