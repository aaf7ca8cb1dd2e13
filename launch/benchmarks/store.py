"""Reading tiles from a store, against reading them from the slides: one worker each; and the JPEG decoder alone.

The three are timed in turn, repeat by repeat, so that a machine whose speed drifts slows all of them; the bound is on
the median of the repeats' ratios. The bound of a case is the lowest of three rates: three times the slides', 1,500
tiles per second, and the decoder's own.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import imagecodecs
import numpy as np
import torch
from matplotlib.figure import Figure

from ds_wsi.bags.bag import read_chunks
from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.temporary import temporary_folder
from ds_wsi.slides.demo import DemoPolicy, make_demo
from ds_wsi.slides.slide import Slide
from ds_wsi.slides.tile_store import StoredSlide, pack_slide, store_path
from ds_wsi.slides.tiling import TileGrid
from launch.benchmarks.table import Bound, Result
from launch.benchmarks.tiles import large_slide, whole_grid

TIMES_SLIDES, ENOUGH_TILES_PER_SECOND = 3, 1_500
READERS = ("slides", "store", "decoder alone")


def measure(*, quick: bool, slides: Sequence[str], options: Mapping[str, str] | None = None) -> Result:
    """Measure the reading of stores of a synthetic slide, of the demo's, and of files named in `slides`."""
    del options
    torch.set_num_threads(1)
    folder = Path("runs/benchmark_slides")
    demo = make_demo(folder / "demo", DemoPolicy(train=4, validation=2, test=2))
    large = large_slide(folder / "large.tiff")
    cases = [
        ("JPEG 4,096 px, 256 px", large, 256),
        ("JPEG 4,096 px, 240 px", large, 240),  # no multiple of the file's own tiles: encoded
        ("demo, 64 px", demo.parent / "slides" / "demo_002.tiff", 64),
        *((f"{Path(name).name}, 256 px", Path(name), 256) for name in slides),
    ]
    repeats = 3 if quick else 7
    rows, bounds = [], []
    for name, path, size in cases:
        with temporary_folder(folder) as scratch:
            row, ratio = _measure_case(name, path, size, scratch / "store", repeats)
        rows.append(row)
        words = (
            f"{name}: the store over the lowest of {TIMES_SLIDES} x slides, {ENOUGH_TILES_PER_SECOND}/s and the decoder"
        )
        bounds.append(Bound(words, ratio, 1.0))
    return Result("Tiles read a second, from slides and from a store", rows, bounds, lambda f: _draw(f, rows), {})


def _measure_case(name: str, path: Path, size: int, folder: Path, repeats: int) -> tuple[dict[str, Any], float]:
    grid = whole_grid(path, size)
    start = time.perf_counter()
    with Slide(path, mpp=0.5) as slide:
        pack_slide(slide, grid, folder)
    packing = len(grid) / (time.perf_counter() - start)
    passes = math.ceil((24_000 if size < 128 else 3_000) / len(grid))
    rates: dict[str, list[float]] = {reader: [] for reader in READERS}
    for _ in range(repeats):
        rates["slides"].append(_worker_rate(path, grid, passes, ""))
        rates["store"].append(_worker_rate(path, grid, passes, str(folder)))
        rates["decoder alone"].append(_decoder_rate(store_path(folder, grid.slide_id), grid, passes))
    ratio = median(
        store / min(TIMES_SLIDES * slides, ENOUGH_TILES_PER_SECOND, decoder)
        for slides, store, decoder in zip(*(rates[reader] for reader in READERS), strict=True)
    )
    medians = {f"{reader}, tiles/s": median(values) for reader, values in rates.items()}
    n_bytes = store_path(folder, grid.slide_id).stat().st_size / len(grid)
    logger.info("%s: %s, packed at %.0f tiles/s, ratio %.2f", name, medians, packing, ratio)
    return {"case": name, **medians, "packing, tiles/s": packing, "bytes per tile": n_bytes}, ratio


def _worker_rate(path: Path, grid: TileGrid, passes: int, store: str) -> float:
    """Tiles per second through one worker, from the first chunk to the last."""
    # From the slide each pass is one of its own, opened anew with nothing cached; a store has nothing to cache.
    name = f"{path.stem}_{{}}" if not store else path.stem
    slides = [SlideEntry(name.format(index), path, 0, "", mpp=0.5) for index in range(passes)]
    policy = ReadPolicy(workers=1, open_slides=1, tile_store=store)
    stream = read_chunks(slides, [grid] * passes, range(passes), policy)
    next(stream)
    start = time.perf_counter()
    tiles = sum(len(chunk.tiles) for chunk in stream)
    return tiles / (time.perf_counter() - start)


def _decoder_rate(path: Path, grid: TileGrid, passes: int) -> float:
    """Tiles a second of the decoder, from memory to memory."""
    with StoredSlide(path) as stored:
        jpegs = [stored.jpeg(row) for row in range(len(grid))]
    out = np.empty((grid.tile_size_px, grid.tile_size_px, 3), dtype=np.uint8)
    start = time.perf_counter()
    for _ in range(passes):
        for jpeg in jpegs:
            imagecodecs.jpeg8_decode(jpeg, out=out)
    return passes * len(jpegs) / (time.perf_counter() - start)


def _draw(figure: Figure, rows: Sequence[dict[str, Any]]) -> None:
    axes = figure.subplots()
    width = 0.8 / len(READERS)
    for number, reader in enumerate(READERS):
        positions = [index + number * width for index in range(len(rows))]
        axes.barh(positions, [row[f"{reader}, tiles/s"] for row in rows], width, label=reader)
    axes.set_yticks([index + width for index in range(len(rows))], [row["case"] for row in rows])
    axes.set_xscale("log")
    axes.set_xlabel("tiles per second, one worker")
    axes.legend()
