"""The tiles of a bag that are trained on, so many of each slide and of the bag: a pure function of (seed, epoch)."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, groupby, pairwise
from math import floor

import torch

from ds_wsi.bags.joined import Grid, GridPart, JoinedGrid
from ds_wsi.bags.sampler import choose_tiles
from ds_wsi.runtime.seeding import slide_seed

SCALE_STEP = 2**40  # between the draws of a slide's magnifications
STEPS = 2**30  # of the draw that rounds shares


@dataclass(frozen=True)
class TileBudget:
    """The most tiles of a training bag.

    Args:
        per_slide: the most of each slide, drawn without repeats; None takes all.
        per_bag: the most of the bag, shared out over its slides by `share_out`; None takes all.
        ratio: the shares of a slide's magnifications in what it has, such as (4, 1); empty: as many as there are.
    """

    per_slide: int | None = None
    per_bag: int | None = None
    ratio: tuple[int, ...] = ()

    def taken(self, grid: Grid | JoinedGrid) -> int:
        """How many tiles of a bag are trained on: the same in each epoch."""
        return self._capped(sum(self._slides(grid)))

    def choose(self, grid: Grid | JoinedGrid, row: int, seed: int, epoch: int) -> tuple[int, ...] | None:
        """The rows of a bag's grid to train on, in their order, none twice; None for all.

        A slide's are those that `choose_tiles` draws by (seed, epoch, the slide's number), in any bag.

        Args:
            grid: the bag's.
            row: the bag's own, in its cohort.
            seed, epoch: the run's.
        """
        if not isinstance(grid, JoinedGrid):
            return choose_tiles(len(grid), self.taken(grid), (seed, epoch, row))
        if self.taken(grid) == len(grid):
            return None
        slides = _by_slide(grid)
        lengths = [sum(len(part.grid) for part in parts) for parts in slides]
        of_slides = share_out(self.taken(grid), lengths, self._slides(grid), (seed, epoch, row))
        counts = [
            n
            for parts, of_slide in zip(slides, of_slides, strict=True)
            for n in self._of_slide(parts, of_slide, seed, epoch)
        ]
        rows: list[int] = []
        for part, first, count in zip(grid.parts, grid.bounds, counts, strict=False):
            chosen = choose_tiles(len(part.grid), count, (seed, epoch, part.number + SCALE_STEP * part.scale))
            rows += [first + one for one in (range(len(part.grid)) if chosen is None else chosen)]
        return tuple(rows)

    def _of_slide(self, parts: Sequence[GridPart], count: int, seed: int, epoch: int) -> tuple[int, ...]:
        """What each magnification of a slide has of its tiles; where one has too few, the others have more."""
        lengths = [len(part.grid) for part in parts]
        return share_out(count, self.ratio or lengths, lengths, (seed, epoch, parts[0].number))

    def _slides(self, grid: Grid | JoinedGrid) -> list[int]:
        """The most tiles of each slide."""
        lengths = [len(grid)]
        if isinstance(grid, JoinedGrid):
            lengths = [sum(len(part.grid) for part in parts) for parts in _by_slide(grid)]
        return [min(length, self.per_slide or length) for length in lengths]

    def _capped(self, count: int) -> int:
        return min(count, self.per_bag or count)


def _by_slide(grid: JoinedGrid) -> list[list[GridPart]]:
    """The parts of each slide, which lie side by side."""
    return [list(parts) for _, parts in groupby(grid.parts, key=lambda part: part.number)]


def share_out(total: int, weights: Sequence[int], most: Sequence[int], key: tuple[int, int, int]) -> tuple[int, ...]:
    """Whole shares of `total` in proportion to weights, none above its `most`; the rest goes to the others alike.

    A share that is no whole number is rounded up in as many epochs as its fraction says, so that a small slide has its
    turn: all shares are laid end to end, and cut at whole numbers from one drawn start on (systematic sampling).

    Args:
        total: what is shared, at most the sum of `most`.
        weights: one per share, positive where `most` is.
        most: the largest that each may be.
        key: (seed, epoch, bag): nothing else decides.
    """
    shares = [Fraction(0)] * len(weights)
    left, unfilled = total, [index for index in range(len(weights)) if most[index]]
    while unfilled:
        weight = sum(weights[index] for index in unfilled)
        full = [index for index in unfilled if left * weights[index] >= most[index] * weight]
        for index in full or unfilled:
            shares[index] = Fraction(most[index]) if full else Fraction(left * weights[index], weight)
        left -= sum(most[index] for index in full)
        unfilled = [index for index in unfilled if index not in full] if full else []
    generator = torch.Generator().manual_seed(slide_seed(*key) ^ 0xBA65)  # not the draw of the tiles
    start = Fraction(int(torch.randint(STEPS, (1,), generator=generator).item()), STEPS)
    ends = [floor(end + start) for end in accumulate(shares, initial=Fraction(0))]
    return tuple(last - first for first, last in pairwise(ends))
