"""The tiles that slides are tested on: all of them, or so many at random, several times."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_wsi.runtime.bounds import MOST_DRAWS, require_at_most


@dataclass(frozen=True)
class EvaluationProtocol:
    """The tiles of a test slide that a prediction is made from.

    The seed is not the training's: models trained with different seeds are tested on the same tiles.

    Args:
        tiles: tiles drawn of each slide in each run, none twice; None takes all. A slide with fewer is taken whole.
        runs: independent draws; 1 where all tiles are taken.
        seed: the seed of the draws.
    """

    tiles: int | None = None
    runs: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what draws nothing, and what repeats the same."""
        if self.tiles is not None and self.tiles < 1:
            raise ValueError(f"--eval_tiles must be at least 1, or all, got {self.tiles}")
        if self.runs < 1:
            raise ValueError(f"--eval_runs must be at least 1, got {self.runs}")
        require_at_most("--eval_runs", self.runs, MOST_DRAWS)
        if self.tiles is None and self.runs > 1:
            raise ValueError(
                f"--eval_runs must be 1 where all tiles are taken, got {self.runs}: the runs would be the same. "
                "HINT: give --eval_tiles."
            )

    def __str__(self) -> str:
        if self.tiles is None:
            return "all tiles"
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{self.tiles:,} random tiles, {self.runs} {'run' if self.runs == 1 else 'runs'}{seed}"

    def draw(self, n_tiles: int, run: int, slide_id: str) -> Tensor:
        """The rows of a bag that run number `run` takes: int64 [min(tiles, n_tiles)], ascending, none twice.

        (seed, run, slide_id) alone decides, so that ranks, manifests and models agree.
        """
        if self.tiles is None or self.tiles >= n_tiles:
            return torch.arange(n_tiles)
        key = hashlib.sha256(f"{self.seed}/{run}/{slide_id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
        return torch.randperm(n_tiles, generator=generator)[: self.tiles].sort().values
