"""The side of square tiles, from where they lie."""

import numpy as np

MAX_GUESSED_SIDE = 2048  # level-0 px: 256 px at 5x of a slide of 40x
SOLID = 0.5  # share of the tiles with a neighbour, from which their distance is their side


def side_of(coords: np.ndarray) -> float | None:
    """The side of square tiles that do not overlap, from their places; None where these do not tell it.

    The distances of neighbours along rows and along columns are whole multiples of the side, and where tissue is solid
    most are the side itself. It is taken where both directions agree on it and half of the tiles have a neighbour at
    it; tiles that are scattered, of which no two may lie side by side, tell nothing. One row or column of tiles has one
    direction only, and must be unbroken.
    """
    steps: list[np.ndarray] = []
    for along, across in ((0, 1), (1, 0)):
        ordered = coords[np.lexsort((coords[:, along], coords[:, across]))]
        beside = np.diff(ordered[:, across]) == 0
        gaps = np.diff(ordered[:, along])[beside]
        steps.append(gaps[gaps > 0])
    smallest = [int(_commonest(gaps)) for gaps in steps if len(gaps)]
    if not smallest or min(smallest) > MAX_GUESSED_SIDE or max(smallest) != min(smallest):
        return None
    side = smallest[0]
    if len(smallest) == 1:
        (line,) = (gaps for gaps in steps if len(gaps))
        return float(side) if len(line) > 1 and (line == side).all() else None
    return float(side) if _share_with_neighbour(coords, side) >= SOLID else None


def _commonest(values: np.ndarray) -> int:
    distinct, counts = np.unique(values, return_counts=True)
    return int(distinct[counts.argmax()])


def _share_with_neighbour(coords: np.ndarray, side: int) -> float:
    places = {tuple(corner) for corner in coords.tolist()}
    around = ((side, 0), (-side, 0), (0, side), (0, -side))
    return sum(any((x + dx, y + dy) in places for dx, dy in around) for x, y in places) / len(places)
