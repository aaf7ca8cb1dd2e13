"""The tiles of several grids, or files of features, as those of one bag: of several slides, or magnifications."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ds_wsi.bags.features import FeatureFile
from ds_wsi.bags.slide_entry import SlideEntry
from ds_wsi.slides.tiling import TileGrid

Grid = TileGrid | FeatureFile


class GridPart(NamedTuple):
    """One slide's share of a bag.

    Attributes:
        entry: the slide.
        grid: the slide's tiles, or its file of features.
        number: the slide's number among all slides of the cohort: what it draws by, in a bag of its own or another's.
        scale: the number of its magnification, the finest 0.
    """

    entry: SlideEntry
    grid: Grid
    number: int
    scale: int = 0


class Place(NamedTuple):
    """Where a bag's tile lies: its slide, the grid or file, and the row there."""

    entry: SlideEntry
    grid: Grid
    row: int


@dataclass(frozen=True, eq=False)
class JoinedGrid:
    """A bag of several slides, or magnifications: what a TileGrid or FeatureFile is in a bag of one.

    A row of it is a row of its parts, counted through them in their order.

    Attributes:
        parts: one at least, all of tiles of one side or all of features.
    """

    parts: tuple[GridPart, ...]

    def __len__(self) -> int:
        return self.bounds[-1]

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Where each part begins, and the end: part p holds the rows bounds[p] to bounds[p + 1]."""
        return tuple(accumulate((len(part.grid) for part in self.parts), initial=0))

    def place(self, row: int) -> Place:
        """The place of a row."""
        index = bisect_right(self.bounds, row) - 1
        part = self.parts[index]
        return Place(part.entry, part.grid, row - self.bounds[index])

    def counts(self, rows: Sequence[int] | Tensor) -> list[int]:
        """How many of these rows lie in each part."""
        bounds = torch.tensor(self.bounds[1:])
        parts = torch.bucketize(torch.as_tensor(rows, dtype=torch.int64), bounds, right=True)
        counts: list[int] = torch.bincount(parts, minlength=len(self.parts)).tolist()
        return counts


Grids = Sequence[TileGrid] | Sequence[FeatureFile] | Sequence[JoinedGrid]


def parts_of(entry: SlideEntry, grid: Grid | JoinedGrid, number: int) -> tuple[GridPart, ...]:
    """The parts of a bag; of one slide's, which is row `number` of its cohort, the whole."""
    return grid.parts if isinstance(grid, JoinedGrid) else (GridPart(entry, grid, number),)


def place_of(entry: SlideEntry, grid: Grid | JoinedGrid, row: int) -> Place:
    """Where row `row` of a bag lies."""
    return grid.place(row) if isinstance(grid, JoinedGrid) else Place(entry, grid, row)


def shares_of(grid: Grid | JoinedGrid, rows: Sequence[int]) -> list[tuple[Grid, Sequence[int]]]:
    """The grids or files of a bag's rows, which ascend, each with its own rows; those without one are left out."""
    if not isinstance(grid, JoinedGrid):
        return [(grid, rows)] if len(rows) else []
    shares: list[tuple[Grid, Sequence[int]]] = []
    start = 0
    for part, first, count in zip(grid.parts, grid.bounds, grid.counts(rows), strict=False):
        if count:
            shares.append((part.grid, [row - first for row in rows[start : start + count]]))
        start += count
    return shares


def some_grid(grids: Grids) -> Grid:
    """One of the grids or files, which tells of what kind all are."""
    first = grids[0]
    return first.parts[0].grid if isinstance(first, JoinedGrid) else first


def stretches(grid: Grid | JoinedGrid, number: int, rows: Tensor) -> list[tuple[int, int]]:
    """(number of the slide, count) of each slide's tiles among `rows`, which ascend, in their order.

    Args:
        grid: the bag's.
        number: the bag's row in its cohort.
        rows: int64 [N], rows of the grid.
    """
    if not isinstance(grid, JoinedGrid):
        return [(number, len(rows))]
    if not len(rows):  # other ranks hold the bag's tiles
        return [(grid.parts[0].number, 0)]
    counts = zip(grid.parts, grid.counts(rows), strict=True)
    return [(part.number, count) for part, count in counts if count]


def scales_of(grid: Grid | JoinedGrid, rows: Tensor) -> Tensor:
    """The number of the magnification of each of a bag's rows, which ascend: int64 [N]."""
    if not isinstance(grid, JoinedGrid):
        return torch.zeros(len(rows), dtype=torch.int64)
    scales = torch.tensor([part.scale for part in grid.parts])
    return scales.repeat_interleave(torch.tensor(grid.counts(rows)))
