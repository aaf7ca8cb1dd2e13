"""A run's settings as YAML: option names and their values, and below "ds_wsi" what has no option.

A preset gives way to the YAML, the YAML to the DeepSpeed JSON, and that to the command line.
"""

import argparse
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ds_wsi.config import SECTION, is_plan, write_section
from ds_wsi.runtime.files import read_file, write_text
from ds_wsi.runtime.setting import FLAG, SWITCH
from ds_wsi.training.setting_list import GROUPS, OPTIONS, SETTINGS, Declared, value_at
from ds_wsi.training.settings import TrainSettings

ALLOWED = "allow_code"
# What belongs to one start of a run and not to its settings: where it goes on, and the word of who starts it; of a
# recipe the file has what it set.
NOT_WRITTEN = ("resume_from_checkpoint", "recipe", ALLOWED)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Field -> value of what a YAML file sets.

    Raises:
        ValueError: no YAML file, no mapping, a key that is no option, or a value that its option does not take; names
            the file, the key and the value.
    """
    import yaml  # here, because help pages need none

    try:
        content = yaml.safe_load(read_file(path).decode())
    # Values that look like dates or numbers, and are none, raise ValueErrors of their own.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"--config must be a YAML file, got {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping | None):
        raise ValueError(f"--config must hold options and their values, got {type(content).__name__} in {path}")
    values: dict[str, Any] = {}
    for key, value in (content or {}).items():
        if key == SECTION:
            values |= _of_section(value, path)
            continue
        name = str(key).replace("-", "_")
        if name not in OPTIONS:
            near = get_close_matches(name, OPTIONS, n=1)
            hint = f"did you mean {near[0]}?" if near else "ds-wsi train --help lists them."
            raise ValueError(f"{path}: {key} must be an option of training, or {SECTION}. HINT: {hint}")
        if name == ALLOWED:
            raise ValueError(f"{path}: {key} must be given on the command line, got it in a file. HINT: --{ALLOWED}.")
        if value is not None:  # left as it is
            values[OPTIONS[name].field_path] = _parsed(OPTIONS[name], value, f"{path}: {name}")
    return values


def _of_section(values: Any, path: str | Path) -> dict[str, Any]:
    if not isinstance(values, Mapping) or not all(isinstance(policy, Mapping) for policy in values.values()):
        raise ValueError(f"{path}: {SECTION} must hold policies and their keys, got {values!r}")
    return {f"policies.{policy}.{name}": value for policy, keys in values.items() for name, value in keys.items()}


def _parsed(one: Declared, value: Any, where: str) -> Any:
    """A value as its option would take it from the command line."""
    kind = one.setting.kind
    if kind in (FLAG, SWITCH):
        if not isinstance(value, bool):
            raise ValueError(f"{where} must be true or false, got {value!r}")
        return value
    text = typed(value)
    if isinstance(kind, tuple):
        by_lower_case = {choice.lower(): choice for choice in kind}
        text = {"true": "yes", "false": "no"}.get(text, text) if isinstance(value, bool) else text  # YAML's yes and no
        if text in kind:
            return text
        if text.lower() not in by_lower_case:
            raise ValueError(f"{where} must be one of {', '.join(kind)}, got {value!r}")
        return by_lower_case[text.lower()]
    try:
        return kind(text)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ValueError(f"{where} must be what --{one.setting.option} takes, got {value!r}: {error}") from error


def typed(value: Any) -> str:
    """A value as it would be typed after its option."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={typed(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(typed, value))
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def write_yaml(settings: TrainSettings, path: str | Path) -> None:
    """Write a file that `read_yaml` reads these settings from; defaults stand in it as comments.

    Raises:
        ValueError: the file exists.
    """
    if Path(path).exists():
        raise ValueError(f"--write_config must be a new file, got {path}, which exists. HINT: another name.")
    write_text(Path(path), yaml_text(settings))


def yaml_text(settings: TrainSettings) -> str:
    """The settings in the order of the help page, each with its sentence."""
    lines = ["# Settings of a run: ds-wsi train --config THIS_FILE. The command line overrides them.", ""]
    for group in GROUPS:
        lines += [f"# --- {group} ---", ""]
        for name, one in OPTIONS.items():
            if one.group == group and name not in NOT_WRITTEN:
                value = value_at(settings, one.field_path)
                mark = "# " if value == one.default else ""
                lines += [f"# {one.setting.help}", f"{mark}{_line(name, value, one)}", ""]
    rest = _without_option(settings)
    if rest:
        lines += ["# --- without an option ---", "", f"{SECTION}: {_dumped(rest)}", ""]
    return "\n".join(lines)


def _line(name: str, value: Any, one: Declared) -> str:
    if value is None:
        return f"{name}: all" if "all" in (one.setting.words, *one.setting.words.split()) else f"{name}:"
    if name.endswith("_options"):
        return f"{name}: {_dumped(dict(value))}"
    return f"{name}: {_dumped(list(value) if isinstance(value, tuple) else value)}"


def _dumped(value: Any) -> str:
    import yaml  # here, because help pages need none

    text: str = yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=10**6)
    return text.removesuffix("...\n").rstrip()


def _without_option(settings: TrainSettings) -> dict[str, Any]:
    """What is no default in the "ds_wsi" section and has no option."""
    section = write_section(settings.policies)
    rest: dict[str, dict[str, Any]] = {}
    if is_plan(settings.policies.partition):
        rest["partition"] = section.pop("partition")
    for policy, values in section.items():
        for name, value in values.items():
            one = SETTINGS[f"policies.{policy}.{name}"]
            if not one.setting.option and value != one.default:
                rest.setdefault(policy, {})[name] = list(value) if isinstance(value, tuple) else value
    return rest
