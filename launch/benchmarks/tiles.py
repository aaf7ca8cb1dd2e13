"""Reading tiles: OpenSlide, against ours in one process and with 1 and 2 workers; and memory over many slides.

The four are measured in turn, repeat by repeat, so that a machine whose speed drifts slows all of them; what is
compared is the median of the repeats' ratios of processor time, ours of the workers, their start too, and of the
process that takes their tiles: what else the machine does counts little. The rates by the clock are told beside. The
proof of a slide is made before, as a training run makes it once.
"""

import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import openslide
import psutil
import tifffile
import torch
from matplotlib.figure import Figure
from PIL import Image

from ds_wsi.bags.bag import read_chunks
from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.runtime.log import logger
from ds_wsi.slides.demo import DemoPolicy, make_demo
from ds_wsi.slides.demo_drawing import draw_slide
from ds_wsi.slides.direct.errors import NotDirectError
from ds_wsi.slides.direct.proof import open_direct
from ds_wsi.slides.policy import BOX, DCT, TilingPolicy
from ds_wsi.slides.pyramid import write_pyramid
from ds_wsi.slides.slide import Slide, SlideCache
from ds_wsi.slides.tiling import TileGrid, plan_coords
from launch.benchmarks.table import Bound, Result

# A bound is a multiple of OpenSlide's rate: one for the process that reads, one for workers, which also hand the tiles
# over; for a tile of 256 px that costs half of its reading.
DEMO_BOUNDS = 2.5, 2.0
# The keys say by how much a tile is shrunk, and how.
SAME, HALF_BOX, HALF_DCT = (1, BOX), (2, BOX), (2, DCT)
TILED_BOUNDS = {SAME: (6.0, 3.0), HALF_BOX: (4.0, 3.0), HALF_DCT: (8.0, 5.0)}
YOUR_BOUNDS = {
    SAME: (3.0, 2.0),
    HALF_BOX: (3.0, 2.5),
    HALF_DCT: (4.5, 4.0),
}  # of yours, read directly
OPENSLIDE_BOUNDS = dict.fromkeys((SAME, HALF_BOX), (0.9, 0.75))  # of another
MEMORY_BOUND = 1.1  # peak over the second half of the slides, over the peak of the first
TILES, SMALL_TILES = 1000, 20_000  # a repeat, at least; of tiles that are shrunk as many fewer as they read more


class Case(NamedTuple):
    """A slide, the side of its tiles, by how much and how they are shrunk, and the ratios that must hold."""

    name: str
    path: Path
    size: int
    shrunk: int
    shrink: str
    bounds: tuple[float, float]

    @property
    def grid(self) -> TileGrid:
        """Every tile of the slide, and how it is read."""
        return whole_grid(self.path, self.size, self.shrunk, self.shrink)


class Spent(NamedTuple):
    """What so many tiles took: processor time of all processes, and time by the clock times workers."""

    tiles: int
    processor_s: float
    worker_s: float


def measure(*, quick: bool, slides: Sequence[str], options: Mapping[str, str] | None = None) -> Result:
    """Measure the reading of slides; `slides` names files to read beside the demo's and a synthetic one."""
    del options
    torch.set_num_threads(1)
    folder = Path("runs/benchmark_slides")
    demo = make_demo(folder / "demo", DemoPolicy(train=4, validation=2, test=2))
    cases = [
        Case("demo, 64 px", demo.parent / "slides" / "demo_002.tiff", 64, *SAME, DEMO_BOUNDS),
        *_both_sizes("JPEG 4:2:0 4,096 px", tissue_slide(folder / "tissue.tiff"), TILED_BOUNDS),
    ]
    for path in map(Path, slides):
        bounds = YOUR_BOUNDS if _is_read_directly(path) else OPENSLIDE_BOUNDS
        cases += _both_sizes(path.name, path, bounds)
    repeats = 5 if quick else 11
    rows, bounds_found = [], []
    for case in cases:
        differences = _differences(case)
        if case.shrink == BOX:
            same = float(np.mean([one == 0 for one in differences[1]]))
            bounds_found.append(Bound(f"{case.name}: share of tiles with OpenSlide's pixels", same, 1.0))
        for row in _rates(case, repeats):
            row |= {"grey levels from box, mean": float(np.mean(differences[0])), "most": max(differences[1])}
            rows.append(row)
            if row["reader"] != "OpenSlide":
                limit = case.bounds["worker" in row["reader"]]
                words = f"{case.name}: {row['reader']} at least {limit:g} x OpenSlide"
                bounds_found.append(Bound(words, row["ratio"], limit))
    memory = _memory_over_slides(demo.parent, 50)
    half = len(memory) // 2
    growth = max(memory[half:]) / max(memory[:half])
    bounds_found.append(Bound(f"memory over 50 slides flat within {MEMORY_BOUND}", growth, MEMORY_BOUND, at_most=True))
    notes = {"repeats": repeats, "memory_bytes": memory, "processors": os.cpu_count()}
    return Result("Tiles read a second", rows, bounds_found, lambda figure: _draw(figure, rows, memory), notes)


def _both_sizes(name: str, path: Path, bounds: Mapping[tuple[int, str], tuple[float, float]]) -> list[Case]:
    cases = []
    for (shrunk, shrink), limits in bounds.items():
        size = f"{256 * shrunk} px" + " to 256 px" * (shrunk > 1) + f", {shrink}" * (shrink != BOX)
        cases.append(Case(f"{name}, {size}", path, 256, shrunk, shrink, limits))
    return cases


def _is_read_directly(path: Path) -> bool:
    try:
        with openslide.OpenSlide(path) as handle:
            open_direct(path, handle).close()
    except NotDirectError:
        return False
    return True


def large_slide(path: Path) -> Path:
    """A synthetic JPEG slide of 4,096 px, drawn once."""
    if not path.exists():
        noise = np.random.default_rng(0).integers(90, 220, (1024, 1024, 3), dtype=np.uint8)
        write_pyramid(path, noise.repeat(4, axis=0).repeat(4, axis=1), mpp=0.5)
    return path


def tissue_slide(path: Path) -> Path:
    """A synthetic slide of 4,096 px in JPEG tiles of 256 px with colours at half resolution, drawn once."""
    if not path.exists():
        field = draw_slide(tumor=True, side_px=1024, rng=np.random.default_rng(0), foci=3, contrast=1.0, rings=1.0)
        how = {"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 85}, "subsampling": (2, 2)}
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, np.tile(field, (4, 4, 1)), tile=(256, 256), metadata=None, software=False, **how)
    return path


def _rates(case: Case, repeats: int) -> list[dict[str, Any]]:
    grid = case.grid
    passes = math.ceil((SMALL_TILES if case.size < 256 else TILES / case.shrunk**2) / len(grid))
    readers = {
        "OpenSlide": lambda: _by_openslide(case.path, grid, passes),
        "ours, this process": lambda: _by_slide(case.path, grid, passes),
        "ours, 1 worker": lambda: _by_workers(case.path, grid, passes, 1),
        "ours, 2 workers": lambda: _by_workers(case.path, grid, passes, 2),
    }
    spent: dict[str, list[Spent]] = {reader: [] for reader in readers}
    for _ in range(repeats):
        for reader, read in readers.items():
            spent[reader].append(read())
    plain = [one.tiles / one.processor_s for one in spent["OpenSlide"]]
    rows = []
    for reader, passes_spent in spent.items():
        rates = [one.tiles / one.processor_s for one in passes_spent]
        ratio = median(rate / openslide for rate, openslide in zip(rates, plain, strict=True))
        by_clock = median(one.tiles / one.worker_s for one in passes_spent)
        logger.info(
            "%s, %s: %.0f tiles per processor second, %.3g x OpenSlide", case.name, reader, median(rates), ratio
        )
        rows.append(
            {
                "slide": case.name,
                "reader": reader,
                "tiles per processor second": median(rates),
                "tiles/s per worker, by the clock": by_clock,
                "ratio": ratio,
            }
        )
    return rows


def whole_grid(path: Path, size: int, shrunk: int = 1, shrink: str = BOX) -> TileGrid:
    """Every whole tile of level 0, tissue or not, shrunk so many times: what is timed is reading."""
    with Slide(path, mpp=0.5) as slide:
        coords = plan_coords(slide.bounds, size * shrunk)
        return TileGrid(
            slide_id=path.stem,
            coords=coords,
            tile_size_px=size,
            tile_size_level0_px=size * shrunk,
            level=0,
            read_size_px=size * shrunk,
            mpp=slide.mpp * shrunk,
            slide_mpp=slide.mpp,
            slide_width_px=slide.width_px,
            slide_height_px=slide.height_px,
            policy=TilingPolicy(tile_size_px=size, mpp=slide.mpp * shrunk, shrink=shrink),
        )


def _openslide_tile(slide: openslide.OpenSlide, x: int, y: int, grid: TileGrid) -> np.ndarray:
    """What everybody writes first: read_region, RGB, resize, array."""
    picture = slide.read_region((x, y), grid.level, (grid.read_size_px,) * 2).convert("RGB")
    if grid.read_size_px != grid.tile_size_px:
        picture = picture.resize((grid.tile_size_px,) * 2, Image.Resampling.BOX)
    return np.asarray(picture)


def _differences(case: Case) -> tuple[list[float], list[int]]:
    """The grey levels by which each tile differs from OpenSlide's, shrunk by box: their mean, and the most."""
    grid, means, most = case.grid, [], []
    size = grid.read_size_px, grid.tile_size_px
    with openslide.OpenSlide(case.path) as plain, Slide(case.path, mpp=0.5) as slide:
        for x, y in grid.coords.tolist():
            tile = slide.read_tile(x, y, 0, *size, shrink=case.shrink).astype(np.int16)
            difference = np.abs(tile - _openslide_tile(plain, x, y, grid))
            means.append(float(difference.mean()))
            most.append(int(difference.max()))
    return means, most


def _by_openslide(path: Path, grid: TileGrid, passes: int) -> Spent:
    start, began = time.perf_counter(), time.process_time()
    for _ in range(passes):
        with openslide.OpenSlide(str(path)) as slide:
            # The same cache as ours: OpenSlide's default differs from version to version.
            slide.set_cache(openslide.OpenSlideCache(2**25))
            for x, y in grid.coords.tolist():
                _openslide_tile(slide, x, y, grid)
    return Spent(passes * len(grid), time.process_time() - began, time.perf_counter() - start)


def _by_slide(path: Path, grid: TileGrid, passes: int) -> Spent:
    cache = SlideCache(1)
    size = grid.read_size_px, grid.tile_size_px
    out = np.empty((grid.tile_size_px, grid.tile_size_px, 3), dtype=np.uint8)
    start, began = time.perf_counter(), time.process_time()
    for _ in range(passes):
        slide = cache.get(path, 0.5)
        for x, y in grid.coords.tolist():
            slide.read_tile(x, y, grid.level, *size, out=out, shrink=grid.policy.shrink)
        cache.close()
    return Spent(passes * len(grid), time.process_time() - began, time.perf_counter() - start)


def _by_workers(path: Path, grid: TileGrid, passes: int, workers: int) -> Spent:
    """Tiles through worker processes, from before their start to the last tile."""
    # Each pass is a slide of its own, as in a cohort: opened anew, nothing cached.
    slides = [SlideEntry(f"{path.stem}_{index}", path, 0, "", mpp=0.5) for index in range(passes)]
    policy = ReadPolicy(workers=workers, open_slides=1)
    start, began = time.perf_counter(), _processor_s(os.getpid())
    stream: Any = read_chunks(slides, [grid] * passes, range(passes), policy)
    left = passes * len(grid)
    while left:  # not to the stream's end, which is the workers' too
        left -= len(next(stream).tiles)
    ended, after = time.perf_counter(), _processor_s(os.getpid())
    of_workers = sum(_processor_s(child.pid) for child in psutil.Process().children())
    stream.close()
    return Spent(passes * len(grid), after - began + of_workers, (ended - start) * workers)


def _processor_s(pid: int) -> float:
    """Seconds that a process's main thread ran, to the microsecond; psutil's are in steps of ten milliseconds."""
    return int(Path(f"/proc/{pid}/schedstat").read_text("ascii").split()[0]) / 1e9


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
    shown = [row for row in rows if row["reader"] != "OpenSlide"]
    bars.barh([f"{row['slide']}\n{row['reader']}" for row in shown], [row["ratio"] for row in shown], color="#3b6ea5")
    bars.axvline(1, color="black", linewidth=1, linestyle="--")
    bars.set_xlabel("tiles per processor second over OpenSlide's")
    bars.tick_params(labelsize=7)
    line.plot(range(1, len(memory) + 1), [value / 2**20 for value in memory], color="#3b6ea5")
    line.set_ylim(0, 1.15 * max(memory) / 2**20)
    line.set_xlabel("slides read")
    line.set_ylabel("resident memory, MiB")
