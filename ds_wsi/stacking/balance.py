"""The bags that each worker computes: a synchronous step takes as long as its slowest rank."""

from collections.abc import Callable, Sequence

import numpy as np


def assign_bags(
    lengths: Sequence[int],
    workers: int,
    *,
    cost: Callable[[int], float] = float,
    max_tiles: int | None = None,
    balance: str = "lpt",
) -> tuple[tuple[int, ...], ...]:
    """Deal bags to workers; pure, the same on every rank.

    "lpt" gives the costliest bag first, to the worker with the least cost so far that has room: the slowest is within a
    third of the best assignment (Graham, 1969), and far nearer with many bags. "round_robin" deals in turn.

    Args:
        lengths: tiles of each bag.
        workers: how many.
        cost: the cost of a bag of so many tiles.
        max_tiles: tiles of one worker at the most; None for no limit.
        balance: see above.

    Returns:
        Per worker the indices of its bags, rising; some may be empty.

    Raises:
        OverCapError: a bag, or the bags together, exceed `max_tiles`.
    """
    if max_tiles is not None:
        for index, length in enumerate(lengths):
            if length > max_tiles:
                raise OverCapError(index, f"a bag must have at most {max_tiles} tiles, got {length}")
    if balance == "round_robin":
        dealt = [list(range(len(lengths)))[worker::workers] for worker in range(workers)]
        over = [sum(lengths[index] for index in bags) for bags in dealt]
        if max_tiles is not None and max(over) > max_tiles:
            raise OverCapError(None, f"a worker must have at most {max_tiles} tiles, got {max(over)} in turn")
        return tuple(tuple(bags) for bags in dealt)
    costs = [cost(length) for length in lengths]
    loads, tiles = [0.0] * workers, [0] * workers
    dealt = [[] for _ in range(workers)]
    order = sorted(range(len(lengths)), key=lambda index: (-costs[index], index))
    for index in order:
        fits = [w for w in range(workers) if max_tiles is None or tiles[w] + lengths[index] <= max_tiles]
        if not fits:
            raise OverCapError(
                None, f"{len(lengths)} bags of {sum(lengths)} tiles must fit {workers} workers of {max_tiles} tiles"
            )
        worker = min(fits, key=lambda w: (loads[w], w))
        loads[worker] += costs[index]
        tiles[worker] += lengths[index]
        dealt[worker].append(index)
    return tuple(tuple(sorted(bags)) for bags in dealt)


class OverCapError(ValueError):
    """Bags that do not fit under the cap.

    Attributes:
        bag: the one that does not fit alone, or None.
    """

    def __init__(self, bag: int | None, message: str) -> None:
        super().__init__(message)
        self.bag = bag


def fit_cost(lengths: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Least-squares (a, b) of seconds = a n + b n^2, neither negative.

    Raises:
        ValueError: fewer than two different lengths.
    """
    if len(lengths) != len(seconds) or len(set(lengths)) < 2:
        raise ValueError(f"a cost must be fitted to at least two lengths, got {sorted(set(lengths))}")
    n = np.asarray(lengths, dtype=float)
    target = np.asarray(seconds, dtype=float)
    # Relative errors count: a long bag's absolute one would decide alone.
    columns = np.stack([n, n * n], 1) / target[:, None]
    a, b = np.linalg.lstsq(columns, np.ones_like(target), rcond=None)[0]
    if a < 0:
        return 0.0, float((columns[:, 1] @ np.ones_like(target)) / (columns[:, 1] @ columns[:, 1]))
    if b < 0:
        return float((columns[:, 0] @ np.ones_like(target)) / (columns[:, 0] @ columns[:, 0])), 0.0
    return float(a), float(b)
