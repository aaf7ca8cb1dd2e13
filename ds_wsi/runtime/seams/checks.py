"""Checks of the table against what is installed: where names are needed first, and of an instance's methods."""

import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ds_wsi.runtime.seams.row import SEEN, Seam, SeamError
from ds_wsi.runtime.seams.table import SEAMS


@cache
def check_seams(package: str, *uses: str) -> None:
    """Check that an installed package has the private names of some uses; once per process.

    Args:
        package: a key of `SEEN`.
        uses: values of `Seam.use`; none: all of them.

    Raises:
        SeamError: a name is missing, or takes other arguments.
    """
    for row in missing_seams(package, *uses):
        raise _error(row, _problem(row) or "")


def missing_seams(package: str, *uses: str) -> Iterator[Seam]:
    """The rows, but for optional ones, that `check_seams` would refuse."""
    for row in SEAMS:
        if row.package == package and (not uses or row.use in uses) and not row.optional and _problem(row):
            yield row


def check_replaced(owner: Any, use: str) -> None:
    """Check that the methods of an instance that are to be replaced are there, with the parameters that are known.

    Args:
        owner: a DeepSpeed engine, or its optimizer.
        use: the use of the rows, "replaced zero0" to "replaced zero3".

    Raises:
        SeamError: one is missing, or takes other arguments.
    """
    for row in (row for row in SEAMS if row.use == use):
        takes = parameters_of(getattr(owner, row.leaf, None))
        if takes != row.takes:
            raise _error(row, f"{takes}" if takes is not None else "none")


def lacking(owner: Any, *uses: str) -> str | None:
    """The first attribute of some uses that an instance has not, as another kind of optimizer; None: it has all."""
    rows = (row for row in SEAMS if row.use in uses and not row.optional)
    return next((row.leaf for row in rows if not hasattr(owner, row.leaf)), None)


def parameters_of(method: Any) -> tuple[str, ...] | None:
    """The names of a bound method's parameters; None: no method."""
    if not callable(method):
        return None
    names = tuple(inspect.signature(method).parameters)
    if names == ("args", "kwargs"):  # DeepSpeed's profiling wrapper does not say what it wraps
        cells = getattr(method, "__closure__", None) or ()
        wrapped = [cell.cell_contents for cell in cells if inspect.isfunction(cell.cell_contents)]
        if wrapped:
            return tuple(inspect.signature(wrapped[0]).parameters)[1:]
    return names


def value_of(row: Seam) -> Any:
    """What a row names, imported.

    Raises:
        SeamError: it is missing, or takes other arguments.
    """
    problem = _problem(row)
    if problem:
        raise _error(row, problem)
    return _value(row)


def _problem(row: Seam) -> str | None:
    """What there is in a name's place; None where it is as it was seen."""
    module, _, path = row.name.partition(":")
    if path.startswith("*."):
        text = _text_of(module)
        return None if text is not None and re.search(rf"\b{row.leaf}\b", text) else "none"
    try:
        value = _value(row)
    except (ImportError, AttributeError) as error:
        return f"none ({error})"
    if row.takes is None:
        return None
    names = parameters_of(value)
    names = names[1:] if names and names[0] == "self" else names
    return None if names == row.takes else f"{names}"


def _value(row: Seam) -> Any:
    module, _, path = row.name.partition(":")
    value: Any = import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value


@cache
def _text_of(module: str) -> str | None:
    """A module's source, which is not imported for it; None where there is no such module."""
    root, *parts = module.split(".")
    if module in sys.modules and getattr(sys.modules[module], "__file__", None):
        return Path(str(sys.modules[module].__file__)).read_text(encoding="utf-8")
    spec = find_spec(root)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    for folder in folders:
        for path in (Path(folder, *parts).with_suffix(".py"), Path(folder, *parts, "__init__.py")):
            if path.is_file():
                return path.read_text(encoding="utf-8")
    return None


def _error(row: Seam, got: str) -> SeamError:
    oldest, newest = SEEN[row.package]
    oldest = row.since or oldest
    what = "have it" if row.takes is None else f"take {row.takes}"
    return SeamError(
        f"{row.dotted} ({row.purpose}) must {what}, as in {row.package} {oldest} to {newest}, got {got} in "
        f'{row.package} {version(row.package)}. HINT: pip install "{row.package}=={newest}".'
    )
