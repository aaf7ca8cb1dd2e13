"""Encoders and aggregators of the user's own code: `module:callable`, or an entry point's name of an installed package.

[Note: whose word] A name in a call or on a command line is its user's word: the module is imported. A name in a file
(config.json of a run's folder, a YAML) is the word of whoever wrote the file. There it needs the reader's too,
`allow_code`: without it nothing is imported, and the name is refused. Entry points are no exception: their packages are
installed, but the file would choose what they are called with.

[Note: of its module] A callable must be defined in the package that its name says. Else whoever allowed `my_models`
would have allowed what it imports, `my_models:system` of `from os import system`.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from inspect import Parameter, signature
from math import isfinite
from types import ModuleType
from typing import Any

ENCODER, AGGREGATOR = "encoder", "aggregator"
GROUPS = {ENCODER: "ds_wsi.encoders", AGGREGATOR: "ds_wsi.aggregators"}  # of entry points
_WORD = r"[^\W\d]\w*"
_CODE = re.compile(rf"{_WORD}(\.{_WORD})*:{_WORD}")


def is_code(name: str) -> bool:
    """Whether a name is of the form `module:callable`; `hf-hub:` and `local-dir:` are no modules' names."""
    return _CODE.fullmatch(name) is not None


def installed(kind: str) -> dict[str, EntryPoint]:
    """The entry points of installed packages, by name: nothing of theirs is imported.

    Args:
        kind: "encoder" or "aggregator".
    """
    return {entry.name: entry for entry in entry_points(group=GROUPS[kind])}


def is_own(name: str, kind: str) -> bool:
    """Whether a name that is none of ds_wsi's or timm's is of code of the user's."""
    return is_code(name) or name in installed(kind)


def module_of(name: str, kind: str) -> str:
    """The module that a name of own code says."""
    return name.partition(":")[0] if is_code(name) else installed(kind)[name].module


def require_allowed(names: Mapping[str, str], allow_code: Collection[str], place: object) -> None:
    """Refuse own code that a file names and its reader has not allowed; see [Note: whose word].

    Args:
        names: kind -> name of own code.
        allow_code: modules, or whole names, that may be imported; a single one can stand alone.
        place: the file, for the error.

    Raises:
        ValueError: names the code and the remedy; nothing is imported.
    """
    allowed = {allow_code} if isinstance(allow_code, str) else set(allow_code)
    for kind, name in names.items():
        module = module_of(name, kind)
        if not {name, module} & allowed:
            raise ValueError(
                f"{kind} {name!r} must be allowed by you before its module {module} is imported, got the word of a "
                f"file alone ({place}). HINT: --allow_code {module}, in Python allow_code=[{module!r}], where you "
                "trust that module and what the file calls it with."
            )


def find_own(name: str, kind: str) -> Callable[..., Any]:
    """The callable of a name; its module is imported, from the environment or else the current folder.

    Raises:
        ValueError: there is no such module or callable, the module fails, or the callable is another package's.
    """
    module_name = module_of(name, kind)
    try:
        module = _imported(module_name)
        target = getattr(module, name.partition(":")[2], None) if is_code(name) else installed(kind)[name].load()
    except Exception as error:  # of the module's own code, whatever it raises
        raise _not_imported(error, name, kind, module_name) from error
    if not callable(target):
        public = [one for one, value in vars(module).items() if callable(value) and not one.startswith("_")]
        near = difflib.get_close_matches(name.partition(":")[2], public, n=3)
        raise ValueError(
            f"{kind} must name a class or function of {module_name}, got {name!r} ({_file(module)}). "
            f"HINT: {'did you mean ' + ', '.join(near) + '?' if near else 'it must be defined at the top of the file.'}"
        )
    home = str(getattr(target, "__module__", ""))
    if is_code(name) and home.partition(".")[0] != module_name.partition(".")[0]:
        raise ValueError(
            f"{kind} must be defined in the package that its name says, got {name!r}, which is of {home or 'none'}. "
            f"HINT: {home or 'MODULE'}:{name.partition(':')[2]}, or a function of {module_name} that calls it."
        )
    return target


def _imported(name: str) -> ModuleType:
    folder = os.getcwd()
    if not {"", folder} & set(sys.path):
        sys.path.append(folder)  # last: nothing that is installed is another for it
    return import_module(name)


def _not_imported(error: Exception, name: str, kind: str, module: str) -> ValueError:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and f"{module}.".startswith(f"{missing}."):
        return ValueError(
            f"{kind} must name a module of the environment or the current folder, got {name!r}: there is no {missing} "
            f"({os.getcwd()}). HINT: PYTHONPATH=FOLDER, or pip install of its package."
        )
    return ValueError(
        f"{kind} {name!r} must be of a module that can be imported, got {type(error).__name__}: {error}. "
        "HINT: DS_WSI_TRACEBACK=1 shows where it came from."
    )


def _file(module: ModuleType) -> str:
    return str(getattr(module, "__file__", None) or module.__name__)


def source_files(names: Mapping[str, str]) -> dict[str, str]:
    """Name -> the file of the module that it is defined in, of own code that is imported."""
    homes = {name: sys.modules[str(find_own(name, kind).__module__)] for kind, name in names.items()}
    return {name: _file(module) for name, module in homes.items()}


def check_options(name: str, build: Callable[..., Any], options: Mapping[str, Any], given: Collection[str]) -> None:
    """Refuse options that a callable does not take, or lacks.

    Args:
        name: what the callable is called in the error.
        build: the callable.
        options: keyword arguments for it.
        given: what it is given besides, by name or place.

    Raises:
        ValueError: names the option.
    """
    parameters = [one for one in signature(build).parameters.values() if one.name not in given]
    by_name = {one.name: one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
    for key in options:
        if key not in by_name and not takes_any:
            raise ValueError(f"options of {name} must be of {', '.join(by_name) or 'none'}, got {key!r}")
    lacking = [key for key, one in by_name.items() if one.default is Parameter.empty and key not in options]
    if lacking:
        raise ValueError(f"options of {name} must hold {', '.join(lacking)}, which has no default, got none")


def built(name: str, build: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a callable of the user's returns.

    Raises:
        ValueError: it raises; with its words.
    """
    try:
        return build(*arguments, **options)
    except Exception as error:  # of code that nobody here wrote
        raise ValueError(
            f"{name} must be built from {options or 'no options'}, got {type(error).__name__}: {error}. "
            "HINT: DS_WSI_TRACEBACK=1 shows where it came from."
        ) from error


def channels_of(build: Callable[..., Any], name: str, key: str, usual: tuple[float, ...]) -> tuple[float, ...]:
    """The three numbers that a callable says of its input, by its attribute `mean` or `std`; else the usual ones.

    Raises:
        ValueError: the attribute is something else.
    """
    said = getattr(build, key, usual)
    is_three = isinstance(said, tuple | list) and len(said) == 3
    if not is_three or not all(type(one) in (int, float) and isfinite(one) for one in said):
        raise ValueError(f"{key} of {name} must be three numbers, one for each channel in [0, 1], got {said!r}")
    if key == "std" and not min(said) > 0:
        raise ValueError(f"std of {name} must be positive, got {said!r}")
    return tuple(float(one) for one in said)
