"""The largest numbers that a setting takes: beyond them a library would refuse them in its own words, or never end."""

import argparse
from collections.abc import Callable

LARGEST_FACTOR = 1e30  # of learning rates and the like: ten times it, and its sums with weights, are float32
MOST_MICRO_STEPS = 2**16  # each is a forward and backward of its own
MOST_DRAWS = 2**16  # each is a prediction of all test slides
MOST_RESAMPLES = 10**7
MOST_TILES = 10**7  # of a slide
MOST_BLUR_PX = 100
MOST_WORKERS = 1024  # processes or threads of one process
MOST_SEED = 2**43 - 1  # a million times it, the seed of a step, is a whole number of 64 bits
LONGEST_TIMEOUT_S = 366 * 24 * 3600


def require_at_most(name: str, value: float, most: float) -> None:
    """Refuse a number that is larger.

    Raises:
        ValueError: names it.
    """
    if not value <= most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def require_seed(name: str, value: int) -> None:
    """Refuse what not every generator takes.

    Raises:
        ValueError: names it.
    """
    if not 0 <= value <= MOST_SEED:
        raise ValueError(f"{name} must be in [0, {MOST_SEED}], got {value}")


def whole(least: int, most: int) -> Callable[[str], int]:
    """What parses a whole number between two bounds, both included, for an option."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, got {text!r}")
        return value

    return number
