"""Numbers with their nouns, as people write them."""

from collections.abc import Iterable


def counted(number: int, noun: str) -> str:
    """The number and its noun: 1 slide, 3,000 slides, 2 processes."""
    return f"{number:,} {plural(number, noun)}"


def plural(number: int, noun: str) -> str:
    """The noun for so many."""
    if number == 1:
        return noun
    if noun.endswith(("s", "x", "sh", "tch")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def some(names: Iterable[str], shown: int) -> str:
    """The first names, and how many more there are: a, b and 3 more."""
    names = list(names)
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
