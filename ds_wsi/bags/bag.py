"""Tiles read from slides (or rows of features from files) by worker processes: chunks, assembled to bags.

A request names a few tiles of one slide. Workers answer requests in order, each with its own bounded set of open
slides, so that several workers share one large slide, evaluation of a slide of any size needs the memory of a few
chunks, and training has the next bag ready while it computes.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ds_wsi.bags.feature_rows import FeatureRows
from ds_wsi.bags.features import FeatureFile
from ds_wsi.bags.joined import Grid, Grids, JoinedGrid, Place, place_of, some_grid
from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.bags.requests import BagPart, TileChunk, TileRequest, tell_nobody
from ds_wsi.bags.workers import Answer, answers
from ds_wsi.runtime.log import logger
from ds_wsi.slides.policy import AUTO
from ds_wsi.slides.slide import SlideCache, SlideError, TileReadError
from ds_wsi.slides.tile_store import TileStore
from ds_wsi.slides.tiling import TileGrid

MAX_CHUNKS_AHEAD = 32  # per stream: bounds the memory that waiting chunks hold


class Bag(NamedTuple):
    """The tiles of a slide, or this rank's part of them, and their rows in its grid, int64 [N].

    Tiles are uint8 [N, 3, S, S]; of a cohort of features, float32 [N, D].
    """

    slide: int
    tiles: Tensor
    kept: Tensor


class TileDataset(Dataset[TileChunk]):
    """Answers tile requests; opens slides lazily in the process that reads, and keeps a bounded number open.

    Args:
        slides, grids: the cohort's, row by row.
        open_slides: kept open.
        tile_store: the store to read from, or empty.
        reader: see `Slide`.
    """

    def __init__(
        self,
        slides: Sequence[SlideEntry],
        grids: Sequence[TileGrid] | Sequence[JoinedGrid],
        open_slides: int,
        tile_store: str = "",
        reader: str = AUTO,
    ) -> None:
        self.slides = slides
        self.grids = grids
        self.cache = SlideCache(open_slides, reader)
        self.size_px = tile_side(grids)
        self.store = TileStore(tile_store) if tile_store else None
        self.tell: Callable[[int], None] = tell_nobody

    def answer(self, request: TileRequest) -> Answer:
        """A request's answer as a worker hands it over."""
        chunk = self[request]
        return Answer(chunk.tiles, chunk.failures)

    def describe(self, request: TileRequest, row: int) -> str:
        """The slide of a request, and the tile of it that is read or the first to be read, in words."""
        tile_place = self._place(request, row if row >= 0 else next(iter(request.grid_rows), 0))
        where = self.store.directory if self.store is not None else tile_place.entry.path
        x, y = _corner(tile_place)
        return f"slide {tile_place.entry.slide_id}, tile at ({x}, {y}) ({where})"

    def __getitem__(self, request: TileRequest) -> TileChunk:
        """Read the tiles of one request; a tile that fails is reported, never replaced."""
        size = self.size_px
        tiles = np.empty((len(request.grid_rows), size, size, 3), dtype=np.uint8)
        n_read = 0
        failures: list[tuple[int, str]] = []
        for row in request.grid_rows:
            self.tell(row)
            try:
                self._read(*self._place(request, row), tiles[n_read])
                n_read += 1
            except TileReadError as error:
                failures.append((row, str(error)))
        # A view with the channels second: encoders that like channels-last memory get it without a copy.
        read = torch.from_numpy(tiles[:n_read]).permute(0, 3, 1, 2)
        return TileChunk(request, read, tuple(failures))

    def _place(self, request: TileRequest, row: int) -> Place:
        return place_of(self.slides[request.slide], self.grids[request.slide], row)

    def _read(self, entry: SlideEntry, grid: Grid, row: int, out: np.ndarray) -> None:
        assert isinstance(grid, TileGrid)
        if self.store is not None:
            self.store.get(entry.slide_id).read_tile(row, out)
            return
        x, y = (int(value) for value in grid.coords[row])
        # Fetched for each tile: after an error the slide is reopened.
        slide = self.cache.get(entry.path, entry.mpp, entry.slide_id)
        size = grid.read_size_px, grid.tile_size_px
        slide.read_tile(x, y, grid.level, *size, out=out, shrink=grid.policy.shrink)


def _corner(tile_place: Place) -> tuple[int, int]:
    """A tile's upper left corner, level-0 px."""
    assert isinstance(tile_place.grid, TileGrid)  # a file of features is read whole or not at all
    x, y = tile_place.grid.coords[tile_place.row].tolist()
    return x, y


def plan_requests(order: Iterable[int | BagPart], lengths: Sequence[int], chunk_tiles: int) -> Iterator[TileRequest]:
    """Cut bags (an integer is a whole slide), in order, into requests of at most `chunk_tiles` tiles, alike in size.

    Workers take requests in turn: were a slide's last request short, every second worker could be idle half the time.
    """
    for item in order:
        part = item if isinstance(item, BagPart) else BagPart(item, 0, lengths[item])
        length = part.stop - part.start if part.rows is None else len(part.rows)
        pieces = max(1, math.ceil(length / chunk_tiles))  # a part without tiles is asked for too
        ends = [-(-piece * length // pieces) for piece in range(pieces + 1)]  # rounded up
        for piece, (start, stop) in enumerate(pairwise(ends), start=1):
            rows = None if part.rows is None else part.rows[start:stop]
            yield TileRequest(part.slide, part.start + start, part.start + stop, piece == pieces, rows)


def read_chunks(
    slides: Sequence[SlideEntry],
    grids: Grids,
    order: Iterable[int | BagPart],
    policy: ReadPolicy,
) -> Iterator[TileChunk]:
    """Stream the tiles of `order`'s slides, chunk by chunk, read ahead by `policy.workers` processes.

    Args:
        slides, grids: the cohort's, row by row; in a cohort of features each bag is one chunk.
        order: slides to read, or parts of them, repeats allowed; consumed as the stream goes.
        policy: workers, chunk size, bounds.

    Raises:
        WorkerError: a process that reads died, was stopped, or took longer than `policy.timeout_s`; names the tile.
    """
    lengths = [len(grid) for grid in grids]
    dataset, chunk_tiles = _dataset(slides, grids, policy)
    chunks_a_bag = math.ceil(max(lengths) / chunk_tiles)
    # Far enough ahead for one whole bag, within the bound.
    ahead = min(max(chunks_a_bag + 1, 2 * policy.workers), MAX_CHUNKS_AHEAD)
    requests = plan_requests(order, lengths, chunk_tiles)
    of_features = dataset if isinstance(dataset, FeatureRows) else None
    in_memory = _not_in_memory if of_features is None else of_features.held
    if not policy.workers:
        for request in requests:
            answer = in_memory(request)
            chunk = dataset[request] if answer is None else TileChunk(request, *answer)
            if of_features is not None:
                of_features.keep(chunk)
            yield chunk
        return
    stream = answers(
        dataset,
        requests,
        workers=policy.workers,
        ahead=policy.workers * math.ceil(ahead / policy.workers),
        timeout_s=policy.timeout_s,
        describe=dataset.describe,
        known=in_memory,
    )
    with closing(stream):  # now, and not when it is collected: its processes end with it
        for request, (tiles, failures) in stream:
            chunk = TileChunk(request, tiles, failures)
            if of_features is not None:
                of_features.keep(chunk)
            yield chunk


def _not_in_memory(request: TileRequest) -> Answer | None:
    """Tiles are read."""


def _dataset(slides: Sequence[SlideEntry], grids: Grids, policy: ReadPolicy) -> tuple[TileDataset | FeatureRows, int]:
    """What answers the requests, and the most tiles of one."""
    if isinstance(some_grid(grids), FeatureFile):
        files: Any = grids
        return FeatureRows(slides, files), max(map(len, files))  # every request reads its file: one per bag
    tiles: Any = grids
    dataset = TileDataset(slides, tiles, policy.open_slides, policy.tile_store, policy.slide_reader)
    return dataset, policy.tiles_a_chunk(dataset.size_px)


def tile_side(grids: Grids) -> int:
    """Side of the tiles of a cohort of slides, px."""
    grid = some_grid(grids)
    assert isinstance(grid, TileGrid)
    return grid.tile_size_px


def read_bags(
    slides: Sequence[SlideEntry],
    grids: Grids,
    order: Iterable[int | BagPart],
    policy: ReadPolicy,
    failures: "FailureLog",
    *,
    may_be_empty: bool = False,
) -> Iterator[Bag]:
    """Stream bags, in `order`; failed tiles are logged and left out.

    Args:
        slides, grids, order, policy: see `read_chunks`.
        failures: where failed tiles are recorded.
        may_be_empty: a bag without a readable tile is yielded: other ranks hold tiles of it.

    Raises:
        ReadFailureError: too many tiles failed, or all of a bag's.
        FeatureFileError: a file of features has changed or is torn.
        WorkerError: as `read_chunks`.
    """
    parts: list[TileChunk] = []
    for chunk in read_chunks(slides, grids, order, policy):
        failures.add(chunk)
        parts.append(chunk)
        if chunk.request.last:
            kept = torch.cat([part.kept for part in parts])
            if not may_be_empty:
                failures.require_tiles(chunk.request.slide, len(kept))
            tiles = _joined([part.tiles for part in parts])
            parts = []
            yield Bag(chunk.request.slide, tiles, kept)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].dim() == 2:
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))
    # Concatenating the channels-last storage keeps its layout.
    return torch.cat([part.permute(0, 2, 3, 1) for part in parts]).permute(0, 3, 1, 2)


class ReadFailureError(SlideError):
    """More tiles failed to read than the policy allows; of the files, not of the program."""


@dataclass
class FailureLog:
    """The tiles that could not be read, each counted once however often it is tried.

    Args:
        slides, grids: the cohort's, row by row.
        max_failed_fraction: the share of the cohort's tiles that may fail.
    """

    slides: Sequence[SlideEntry]
    grids: Grids
    max_failed_fraction: float
    reasons: dict[tuple[str, int, int], str] = field(default_factory=dict)

    def add(self, chunk: TileChunk) -> None:
        """Record a chunk's failures, warn of the new ones, and stop the run above the threshold."""
        slide = chunk.request.slide
        for row, reason in chunk.failures:
            tile_place = place_of(self.slides[slide], self.grids[slide], row)
            key = (tile_place.entry.slide_id, *_corner(tile_place))
            if key not in self.reasons:
                logger.warning("tile left out: %s", reason)
            self.reasons[key] = reason
        if chunk.failures:
            self.check()

    def check(self) -> None:
        """Raise ReadFailureError where the recorded failures exceed the threshold."""
        self.check_counts(Counter(slide for slide, _, _ in self.reasons))

    def check_counts(self, failed: Mapping[str, int]) -> None:
        """Raise ReadFailureError where the failures of each slide, read here or by others, exceed the threshold."""
        total, n_failed = sum(len(grid) for grid in self.grids), sum(failed.values())
        if n_failed > self.max_failed_fraction * total:
            most = ", ".join(f"{name} ({count})" for name, count in Counter(failed).most_common(5) if count)
            first = [f" (first: {name} at ({x}, {y})): {why}" for (name, x, y), why in self.reasons.items()][:1]
            raise ReadFailureError(
                f"failed tiles must be at most {self.max_failed_fraction:.2%} of the cohort's {total}, got "
                f"{n_failed}{''.join(first)}. Most are of {most}. "
                "HINT: replace the broken files, take them out of the manifest, or raise --max_failed_fraction."
            )

    def require_tiles(self, slide: int, n_tiles: int) -> None:
        """Raise ReadFailureError for a slide of which no tile could be read."""
        if n_tiles == 0:
            raise ReadFailureError(
                f"{self.slides[slide].words} must have a readable tile, all {len(self.grids[slide])} failed "
                f"({self.slides[slide].path}). HINT: replace the file, or take it out of the manifest."
            )

    def rows(self) -> list[dict[str, str | int]]:
        """The failures as table rows, sorted: slide_id, x, y (level-0 px), reason."""
        return [
            {"slide_id": slide, "x": x, "y": y, "reason": reason}
            for (slide, x, y), reason in sorted(self.reasons.items())
        ]
