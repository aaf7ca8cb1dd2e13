"""All settings of a run as they are declared: what options, files, help pages and comparisons are derived from."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from ds_wsi.bags.policy import AugmentPolicy, ReadPolicy
from ds_wsi.compression.comm import CommPolicy
from ds_wsi.config import DsWsiConfig
from ds_wsi.norms.policy import NormPolicy
from ds_wsi.partition.policy import PartitionPolicy
from ds_wsi.runtime.setting import KEY, Decides, Setting
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.stacking.policy import StackingPolicy
from ds_wsi.tile_parallel.policy import TileParallelPolicy
from ds_wsi.training.settings import (
    DataSettings,
    ModelSettings,
    OptimSettings,
    RunSettings,
    TaskSettings,
    TrainSettings,
)

# Path of the dataclass below `TrainSettings` -> it, and the group of its options on the help page.
OWNERS: Mapping[str, tuple[Any, str]] = {
    "data": (DataSettings, "slides"),
    "task": (TaskSettings, "task"),
    "policies.tiling": (TilingPolicy, "tiles"),
    "policies.reading": (ReadPolicy, "tiles"),
    "policies.augment": (AugmentPolicy, "augmentation"),
    "model": (ModelSettings, "model"),
    "policies.norm": (NormPolicy, "BatchNorm"),
    "optim": (OptimSettings, "training"),
    "run": (RunSettings, "run"),
    "policies.partition": (PartitionPolicy, "memory"),
    "policies.stacking": (StackingPolicy, "processes and GPUs"),
    "policies.tile_parallel": (TileParallelPolicy, "processes and GPUs"),
    "policies.compression": (CommPolicy, "processes and GPUs"),
}
# In the order of the help page.
GROUPS = (
    *(
        "slides",
        "task",
        "model",
        "training",
        "run",
        "validation and test",
        "tiles",
        "augmentation",
        "BatchNorm",
        "memory",
    ),
    "processes and GPUs",
)


class Declared(NamedTuple):
    """A setting and where it stands: `field_path` is "group.name" of `TrainSettings`, or "policies.policy.name"."""

    field_path: str
    setting: Setting
    default: Any
    group: str


def _declared() -> dict[str, Declared]:
    by_path = {}
    # A run has a default of its own for a policy that, used alone, has another: it leaves the encoder as it is.
    runs_own = {f"policies.{entry.name}": entry.default for entry in dataclasses.fields(DsWsiConfig)}
    for owner, (kind, group) in OWNERS.items():
        usual = runs_own.get(owner, dataclasses.MISSING)
        for entry in dataclasses.fields(kind):
            if KEY not in entry.metadata:
                raise TypeError(f"{kind.__name__}.{entry.name} must be declared by setting(), got a plain field")
            declared: Setting = entry.metadata[KEY]
            field_path = f"{owner}.{entry.name}"
            default = entry.default if usual is dataclasses.MISSING else getattr(usual, entry.name)
            by_path[field_path] = Declared(field_path, declared, default, declared.group or group)
    return by_path


SETTINGS: Mapping[str, Declared] = _declared()
# Those with an option, by its name.
OPTIONS: Mapping[str, Declared] = {one.setting.option: one for one in SETTINGS.values() if one.setting.option}


def options_of(group: str) -> tuple[str, ...]:
    """Names of the options in a group of the help page."""
    return tuple(name for name, one in OPTIONS.items() if one.group == group)


def value_at(settings: TrainSettings, field_path: str) -> Any:
    """The value of a setting; the default's of a policy that another kind of object stands for (a whole plan)."""
    value: Any = settings
    *owner, name = field_path.split(".")
    for part in owner:
        value = getattr(value, part)
    return getattr(value, name, SETTINGS[field_path].default)


def has_effect(settings: TrainSettings, field_path: str) -> bool:
    """Whether the settings that this one needs are such that it does something."""
    needs = SETTINGS[field_path].setting.needs
    if needs is None:
        return True
    value = value_at(settings, sibling(field_path, needs[0]))
    return value in needs[1] if needs[1] else bool(value)


def sibling(field_path: str, name: str) -> str:
    """Another setting of the same dataclass."""
    return f"{field_path.rpartition('.')[0]}.{name}"


def needed_words(field_path: str) -> str:
    """What a setting needs for an effect, as it is typed: "--comm_hook topk, dmgc or auto"."""
    needs = SETTINGS[field_path].setting.needs
    assert needs is not None, field_path
    name, values = needs
    other = SETTINGS[sibling(field_path, name)].setting.option
    words = list(map(str, values))
    if not words:
        return f"--{other}"
    return f"--{other} " + (words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}")


def key_of(field_path: str) -> str:
    """A setting's key in what files remember of a run: its path, and of a policy without that word."""
    return field_path.removeprefix("policies.")


def default_words(field_path: str) -> str:
    """The default as it would be typed, or in words."""
    one = SETTINGS[field_path]
    if one.setting.words:
        return one.setting.words
    if isinstance(one.default, bool):
        return "on" if one.default else "off"
    if isinstance(one.default, tuple):
        return ",".join(map(str, one.default))
    return str(one.default)


def deciding(settings: TrainSettings, *kinds: Decides) -> dict[str, Any]:
    """Path -> value of the settings that decide something of these kinds, but for those without an effect."""
    return {
        field_path: value_at(settings, field_path)
        for field_path, one in SETTINGS.items()
        if one.setting.decides in kinds and has_effect(settings, field_path)
    }
