"""What a user asks of tile parallelism."""

from dataclasses import dataclass

from ds_wsi.runtime.setting import Decides, setting

EXCHANGES = ("auto", "sharded", "replicated", "gather")


@dataclass(frozen=True)
class TileParallelPolicy:
    """How a bag lies across ranks.

    Args:
        size: ranks that share each bag; it must divide the number of ranks. 1: each rank has bags of its own.
        aggregator: the exchange between encoder and aggregator. "sharded": each rank pools its own tiles and partial
            sums are merged, O(D) bytes; of aggregators that pool in one weighted sum. "replicated": features are
            gathered and every rank runs the aggregator. "gather": the paper's, features to the group's first rank.
            "auto": "sharded" where the aggregator can, else "replicated".
        shares: relative number of tiles of each rank of a group, such as their measured speeds; () for equal ones.
    """

    size: int = setting(
        1, "number of processes that share the tiles of each slide", Decides.NOTHING, option="tile_parallel_size"
    )
    aggregator: str = setting(
        "auto",
        "how processes that share a slide exchange its features",
        Decides.NOTHING,
        option="tile_parallel_aggregator",
        kind=EXCHANGES,
    )
    shares: tuple[float, ...] = setting(
        (),
        "relative number of tiles of each process of a group, such as their measured speeds; empty shares equally",
        Decides.NOTHING,
        kind=None,
    )

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if self.aggregator not in EXCHANGES:
            raise ValueError(f"aggregator must be one of {', '.join(EXCHANGES)}, got {self.aggregator!r}")
        if self.shares and (len(self.shares) != self.size or min(self.shares) < 0 or sum(self.shares) <= 0):
            raise ValueError(
                f"shares must be one number per rank of the group, {self.size}, none negative and not all 0, "
                f"got {list(self.shares)}"
            )
