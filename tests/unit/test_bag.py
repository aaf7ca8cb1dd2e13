import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from logs import logged

from ds_wsi.bags.bag import (
    FailureLog,
    ReadFailureError,
    TileDataset,
    TileRequest,
    plan_requests,
    read_bags,
    read_chunks,
)
from ds_wsi.bags.cohort import load_cohort
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.slides.slide import Slide, TileReadError


@pytest.fixture(scope="module")
def cohort(demo_manifest):
    return load_cohort(demo_manifest, TilingPolicy(tile_size_px=64))


@pytest.fixture(scope="module")
def direct(cohort):
    """Each slide's tiles read one by one, without anything of bags: uint8 [N, 3, S, S]."""
    bags = []
    for entry, grid in zip(cohort.manifest.slides, cohort.grids):
        with Slide(entry.path) as slide:
            tiles = [slide.read_tile(int(x), int(y), grid.level, grid.read_size_px, 64) for x, y in grid.coords]
        bags.append(torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2))
    return bags


@pytest.fixture
def failing(monkeypatch):
    """Tiles to fail, as (slide_id, x, y); None for all of a slide."""
    broken = set()
    read_tile = Slide.read_tile

    def read(self, x, y, *rest, **options):
        if (self.slide_id, x, y) in broken or (self.slide_id, None, None) in broken:
            raise TileReadError(self.slide_id, x, y, OSError("broken JPEG"))
        return read_tile(self, x, y, *rest, **options)

    monkeypatch.setattr(Slide, "read_tile", read)
    return broken


@pytest.fixture
def warnings():
    with logged(logging.WARNING) as records:
        yield records


def bags_of(cohort, order, log=None, **policy):
    log = log or FailureLog(cohort.manifest.slides, cohort.grids, 0.01)
    return list(read_bags(cohort.manifest.slides, cohort.grids, order, ReadPolicy(**policy), log))


def place(cohort, slide, row):
    x, y = cohort.grids[slide].coords[row]
    return cohort.manifest.slides[slide].slide_id, int(x), int(y)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_bags_are_the_tiles_in_order_whatever_the_workers(cohort, direct, workers):
    order = [3, 0, 0, 5, 3]
    bags = bags_of(cohort, order, workers=workers, chunk_tiles=4)
    assert [bag.slide for bag in bags] == order
    for bag in bags:
        assert bag.tiles.dtype == torch.uint8
        assert torch.equal(bag.tiles, direct[bag.slide])
        assert torch.equal(bag.kept, torch.arange(len(cohort.grids[bag.slide])))


@pytest.mark.parametrize("chunk_tiles", [1, 3, 1000])
def test_the_size_of_chunks_changes_nothing(cohort, direct, chunk_tiles):
    (bag,) = bags_of(cohort, [1], workers=0, chunk_tiles=chunk_tiles)
    assert torch.equal(bag.tiles, direct[1])
    assert bag.tiles.is_contiguous(memory_format=torch.channels_last)


def test_requests_cover_each_grid_once_and_close_it():
    assert list(plan_requests([1, 0, 1], [2, 5], 2)) == [
        TileRequest(1, 0, 2, False),
        TileRequest(1, 2, 4, False),
        TileRequest(1, 4, 5, True),
        TileRequest(0, 0, 2, True),
        TileRequest(1, 0, 2, False),
        TileRequest(1, 2, 4, False),
        TileRequest(1, 4, 5, True),
    ]


def test_the_order_is_consumed_as_the_stream_goes(cohort):
    taken = []

    def endless():
        while True:
            taken.append(0)
            yield 0

    stream = read_chunks(cohort.manifest.slides, cohort.grids, endless(), ReadPolicy(workers=0))
    for _ in range(3):
        next(stream)
    stream.close()
    assert len(taken) <= 5


def test_a_failed_tile_is_left_out_counted_once_and_listed(cohort, direct, failing, warnings):
    failing.add(place(cohort, 2, 1))
    log = FailureLog(cohort.manifest.slides, cohort.grids, 0.5)
    for _ in range(2):
        bags = bags_of(cohort, [2, 4], log, workers=0, chunk_tiles=2)
        kept = [row for row in range(len(cohort.grids[2])) if row != 1]
        assert bags[0].kept.tolist() == kept
        assert torch.equal(bags[0].tiles, direct[2][kept])
        assert torch.equal(bags[1].tiles, direct[4])
    slide_id, x, y = place(cohort, 2, 1)
    (row,) = log.rows()
    assert (row["slide_id"], row["x"], row["y"]) == (slide_id, x, y)
    assert "broken JPEG" in row["reason"]
    assert len(warnings) == 1
    assert f"({x}, {y}) of slide {slide_id}" in warnings[0]


def test_a_failed_tile_is_never_replaced_and_those_after_it_close_up(cohort, direct, failing):
    failing |= {place(cohort, 0, row) for row in (0, 2)}
    log = FailureLog(cohort.manifest.slides, cohort.grids, 1.0)
    (bag,) = bags_of(cohort, [0], log, workers=0)
    assert len(bag.tiles) == len(bag.kept) == len(cohort.grids[0]) - 2
    assert torch.equal(bag.tiles, direct[0][bag.kept])
    assert not any((tile == 255).all() or (tile == 0).all() for tile in bag.tiles)
    assert [(entry["x"], entry["y"]) for entry in log.rows()] == sorted(
        (int(x), int(y)) for x, y in cohort.grids[0].coords[[0, 2]]
    )


def test_above_the_threshold_the_run_stops_and_names_the_tile(cohort, failing):
    slide_id, x, y = place(cohort, 1, 0)
    failing.add((slide_id, x, y))
    total = sum(cohort.lengths)
    at_threshold = FailureLog(cohort.manifest.slides, cohort.grids, 1 / total)
    assert len(bags_of(cohort, [0, 1], at_threshold, workers=0)) == 2
    below = FailureLog(cohort.manifest.slides, cohort.grids, 0.9 / total)
    with pytest.raises(ReadFailureError) as caught:
        bags_of(cohort, [0, 1], below, workers=0)
    assert f"cohort's {total}, got 1 (first: {slide_id} at ({x}, {y}))" in str(caught.value)
    assert "--max_failed_fraction" in str(caught.value)


def test_a_slide_without_a_readable_tile_is_an_error(cohort, failing):
    entry = cohort.manifest.slides[3]
    failing.add((entry.slide_id, None, None))
    log = FailureLog(cohort.manifest.slides, cohort.grids, 1.0)
    with pytest.raises(ReadFailureError, match=f"slide {entry.slide_id} must have a readable tile, all") as caught:
        bags_of(cohort, [0, 3], log, workers=0, chunk_tiles=2)
    assert str(entry.path) in str(caught.value)


def test_open_slides_and_file_descriptors_stay_bounded(cohort):
    dataset = TileDataset(cohort.manifest.slides, cohort.grids, open_slides=2)
    descriptors = []
    for _ in range(3):
        for slide in range(len(cohort.grids)):
            dataset[TileRequest(slide, 0, 1, True)]
            assert len(dataset.cache) <= 2
            descriptors.append(len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0)
    assert max(descriptors[8:]) <= max(descriptors[:8])
    dataset.cache.close()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"chunk_tiles": -1}, "chunk_tiles must be at least 0"),
        ({"open_slides": 0}, "open_slides must be at least 1"),
        ({"max_failed_fraction": 1.1}, r"max_failed_fraction must be in \[0, 1\], got 1.1"),
        ({"max_failed_fraction": float("nan")}, "max_failed_fraction"),
    ],
)
def test_counts_that_cannot_be_read_with_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ReadPolicy(**values)
