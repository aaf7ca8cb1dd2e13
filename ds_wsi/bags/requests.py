"""What is asked of the processes that read, and what they answer."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class BagPart(NamedTuple):
    """Tiles of slide number `slide` to read as one bag: rows `start` to `stop` of its grid, or `rows` of it."""

    slide: int
    start: int
    stop: int
    rows: tuple[int, ...] | None = None


class TileRequest(NamedTuple):
    """Rows `start` to `stop` of the grid of slide number `slide`, or `rows` of it; `last` closes the slide's bag."""

    slide: int
    start: int
    stop: int
    last: bool
    rows: tuple[int, ...] | None = None

    @property
    def grid_rows(self) -> Sequence[int]:
        """The rows of the grid."""
        return range(self.start, self.stop) if self.rows is None else self.rows


class TileChunk(NamedTuple):
    """A request's answer.

    Attributes:
        request: what was asked for.
        tiles: uint8 [n, 3, S, S] (stored channels last), the tiles that could be read; float32 [n, D] of features.
        failures: (row in the slide's grid, reason) of each tile that could not.
    """

    request: TileRequest
    tiles: Tensor
    failures: tuple[tuple[int, str], ...]

    @property
    def kept(self) -> Tensor:
        """The rows of the tiles in the slide's grid: int64 [n]."""
        if not self.failures and self.request.rows is None:
            return torch.arange(self.request.start, self.request.stop)
        failed = {row for row, _ in self.failures}
        # Derived here: a second tensor per chunk would double the cost of handing it over.
        return torch.tensor([row for row in self.request.grid_rows if row not in failed], dtype=torch.int64)


def tell_nobody(row: int) -> None:
    """Nobody in the training process asks where reading is."""
