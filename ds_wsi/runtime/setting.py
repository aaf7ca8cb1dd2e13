"""A setting, declared once: a dataclass field with what the command line, files and comparisons of runs need of it.

Options and their help, JSON and YAML keys, what a resumed run must share, what a protocol remembers, what a table pools
and the page of all options are derived from these declarations: see `training/setting_list.py`.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ds_wsi.runtime.units import parse_bytes

FLAG = "flag"
SWITCH = "switch"  # a flag with a --no_ form: something else than the command line may turn it on
KEY = "setting"  # of a field's metadata


class Decides(Enum):
    """What a setting has a part in."""

    RESULT = "the result: another value is another run"
    RESOLVED = "the result, by what it stands for: what files hold, or what is chosen in its place"
    STEP = "with others, how many slides an optimizer step has"
    TEST = "on which tiles a model is tested, which nothing that is trained depends on"
    NAME = "how tables of runs call it"
    NOTHING = "how it is computed, kept or shown, within rounding"


@dataclass(frozen=True)
class Setting:
    """What is declared of a field.

    Args:
        help: a sentence that is understood without the option's name.
        decides: what it has a part in.
        option: name of the command-line option; empty: the field is a key of the JSON's section alone.
        kind: what the option takes: `FLAG`, `SWITCH`, a tuple of choices, or a function of the typed text.
        words: the default in words, where it is no value that could be typed.
        group: the group on the help page; empty: the group of the field's dataclass.
        needs: another field of the dataclass and the values of it with which this one has an effect; no values: any
            but the empty one.
        column: whether tables of runs have a column for it, so that it does not part runs within a cell.
        resolved: the name under which what the value stands for is compared, where that decides.
        bare: the value of an option that is given without one; None: it must be given one.
        metavar: what the help page calls the value; empty: by its kind.
    """

    help: str
    decides: Decides
    option: str = ""
    kind: Any = str
    words: str = ""
    group: str = ""
    needs: tuple[str, tuple[Any, ...]] | None = None
    column: bool = False
    resolved: str = ""
    bare: Any = None
    metavar: str = ""


def setting(default: Any, help: str, decides: Decides, **more: Any) -> Any:
    """A dataclass field with its declaration; `kind` follows from the default where that has a type.

    Args:
        default: value; immutable.
        help: see `Setting`.
        decides: see `Setting`.
        **more: other fields of `Setting`.
    """
    if (decides is Decides.RESOLVED) != ("resolved" in more):
        raise TypeError(f"a setting must say what it is compared by if, and only if, it is resolved, got: {help}")
    if "kind" not in more:
        more["kind"] = {bool: FLAG, int: int, float: float}.get(type(default), str)
    return field(default=default, metadata={KEY: Setting(help, decides, **more)})


# ------------------------------------------------------------------------------------------- kinds of values


def size_in_bytes(text: str) -> int:
    """Parse as `parse_bytes` does, with its words where argparse would say only that the value is invalid."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def size_or_none(text: str) -> int:
    """Parse as `size_in_bytes` does, or 0."""
    return 0 if text.strip() == "0" else size_in_bytes(text)


def tiles_or_all(text: str) -> int | None:
    """A number of tiles, or None for "all"."""
    try:
        return None if text == "all" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number of tiles, or all, got {text!r}") from error


def comma_separated(text: str) -> tuple[str, ...]:
    """The parts, without the spaces around them; empty ones stay."""
    return tuple(part.strip() for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """The parts between commas that are not empty."""
    return tuple(name for name in comma_separated(text) if name)


def ordered_names(text: str) -> tuple[str, ...]:
    """The parts between commas, or without a comma between signs of order, that are not empty: "low<middle<high"."""
    return names(text if "," in text else text.replace("<", ","))


def numbers(text: str) -> tuple[float, ...]:
    """Numbers between commas."""
    try:
        return tuple(float(name) for name in names(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be numbers such as 1,2.5, got {text!r}") from error


def ratio(text: str) -> tuple[int, ...]:
    """Positive whole numbers between colons, or commas, as files have them: "4:1"."""
    parts = text.replace(",", ":").split(":")
    if len(parts) < 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"must be positive whole numbers such as 4:1, got {text!r}")
    return tuple(int(part) for part in parts)


def assignments(text: str) -> tuple[tuple[str, float | str], ...]:
    """Names and values: numbers, true and false as JSON has them, other words as they are."""
    pairs = []
    for part in names(text):
        name, sign, word = part.partition("=")
        if not (sign and name.strip() and word.strip()):
            raise argparse.ArgumentTypeError(f"must be name=value pairs such as landmarks=64,heads=4, got {part!r}")
        try:
            value = json.loads(word)
        except json.JSONDecodeError:
            value = word.strip()
        pairs.append((name.strip(), value))
    return tuple(pairs)


Parse = Callable[[str], Any]
METAVARS: dict[Any, str] = {int: "N", float: "X", size_in_bytes: "SIZE", size_or_none: "SIZE|0", tiles_or_all: "N|all"}
