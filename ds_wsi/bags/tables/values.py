"""Values of a table: words that say that there is none, numbers in their spellings, splits, spellings of one word."""

import difflib
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

SPLITS = ("train", "validation", "test")
SPLIT_ALIASES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "tune": "validation",
    "test": "test",
    "testing": "test",
}
# What R, pandas, SQL, spreadsheets and people write for a value that they do not have.
MISSING_WORDS = frozenset(
    (
        *("na", "n/a", "n.a.", "n.a", "#n/a", "#na", "<na>", "nan", "-nan", "nat", "none", "null", "nil", "empty"),
        *("missing", "unknown", "unk", "undefined", "not available", "not reported", "[not available]"),
        *("-", "--", "?", "??", ".", "#value!", "#ref!", "#name?", "#div/0!", "(null)", "<null>", "\\n"),
    )
)
_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)(e[+-]?\d+)?", re.IGNORECASE)


def says_missing(text: str) -> bool:
    """Whether a value is a word for none."""
    return text.casefold() in MISSING_WORDS


def number_of(text: str, decimal_comma: bool = False) -> float | None:
    """The finite number that a text is, in decimal or exponent form; None where it is none.

    Args:
        text: a number's, such as 0.25 or 2.5e-1.
        decimal_comma: 0,25 is a number too.
    """
    if not _NUMBER.fullmatch(text) or ("," in text and not decimal_comma):
        return None
    value = float(text.replace(",", "."))
    return value if math.isfinite(value) else None


def mpp_of(text: str, decimal_comma: bool, place: str) -> tuple[float | None, str | None]:
    """The resolution in um/px that a cell gives, None where it is empty; and what is wrong with it, or None.

    Args:
        text: the cell's.
        decimal_comma: 0,25 is a number too.
        place: where the cell stands, for the message.
    """
    if not text:
        return None, None
    value = number_of(text, decimal_comma)
    if value is not None and value > 0:
        return value, None
    hint = "leave it empty where it is unknown" if says_missing(text) or value is not None else "write it as 0.25"
    return None, f"mpp must be a number of um/px, got {text!r} ({place}). HINT: {hint}."


def split_of(text: str) -> str | None:
    """The split that a word names, in any case; None where it names none."""
    return SPLIT_ALIASES.get(text.casefold())


def split_hint(text: str) -> str:
    """What to do about a word that names no split."""
    near = difflib.get_close_matches(text.casefold(), SPLIT_ALIASES, 1, 0.7)
    if near:
        return f"did you mean {SPLIT_ALIASES[near[0]]}?"
    if number_of(text) is not None:
        return "a fold's number is no split: write train, validation or test for this fold, or rename the column"
    return f"write {', '.join(SPLITS[:2])} or {SPLITS[2]}; without the column splits are drawn by patient"


def spelling_key(text: str) -> str | float:
    """Equal for texts that differ in case, blanks, dashes, underscores or a number's format alone."""
    number = number_of(text, decimal_comma=True)
    if number is not None:
        return number
    plain = unicodedata.normalize("NFKC", text).casefold()
    plain = "".join(sign for sign in plain if unicodedata.category(sign) != "Cf")  # of no width
    # Between digits a sign parts two numbers: T1-1 is not T11.
    return re.sub(r"(?<!\d)[\s_\-]+|[\s_\-]+(?!\d)", "", plain) or text


def spelled_several_ways(texts: Iterable[str]) -> list[list[str]]:
    """The groups of different texts that are spellings of one, each sorted."""
    groups: dict[str | float, set[str]] = defaultdict(set)
    for text in texts:
        groups[spelling_key(text)].add(text)
    return [sorted(group) for group in groups.values() if len(group) > 1]
