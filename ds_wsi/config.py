"""The policies as one tree, read from and written to the "ds_wsi" section of a DeepSpeed JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeGuard

from ds_wsi.bags.policy import AugmentPolicy, ReadPolicy
from ds_wsi.compression.comm import CommPolicy
from ds_wsi.norms.policy import NormPolicy
from ds_wsi.partition.policy import PartitionPolicy
from ds_wsi.runtime.units import parse_bytes
from ds_wsi.slides.policy import TilingPolicy, stored_tiling
from ds_wsi.stacking.policy import StackingPolicy
from ds_wsi.tile_parallel.policy import TileParallelPolicy

if TYPE_CHECKING:
    from ds_wsi.partition.planning.plan import PartitionPlan

SECTION = "ds_wsi"


@dataclass(frozen=True)
class DsWsiConfig:
    """The "ds_wsi" section: one policy per key, each with its defaults.

    Args:
        tiling: how slides are tiled.
        reading: how they are read.
        augment: what is changed at each reading in training.
        partition: how the encoder's activations are partitioned: a policy, or under "plan" what `PartitionPlan` wrote.
            Left out, the encoder runs as it is.
        stacking: how the bags of a step lie on ranks and in stacks.
        tile_parallel: how many ranks share each bag, and how they exchange features.
        norm: what the encoder's BatchNorm averages over, in training and in evaluation.
        compression: how gradients are communicated between ranks.
    """

    tiling: TilingPolicy = field(default_factory=TilingPolicy)
    reading: ReadPolicy = field(default_factory=ReadPolicy)
    augment: AugmentPolicy = field(default_factory=AugmentPolicy)
    partition: "PartitionPolicy | PartitionPlan" = field(
        default=PartitionPolicy(mode="native"), metadata={"kind": PartitionPolicy}
    )
    stacking: StackingPolicy = field(default_factory=StackingPolicy)
    tile_parallel: TileParallelPolicy = field(default_factory=TileParallelPolicy)
    norm: NormPolicy = field(default_factory=NormPolicy)
    compression: CommPolicy = field(default_factory=CommPolicy)


def read_section(section: Mapping[str, Any]) -> DsWsiConfig:
    """Build the policies from the section.

    Raises:
        ValueError: names the full key of what is unknown, of another type, or out of range.
    """
    if not isinstance(section, Mapping):
        raise ValueError(f"{SECTION} must be an object, got {section!r}")
    kinds = {entry.name: entry.metadata.get("kind", entry.default_factory) for entry in fields(DsWsiConfig)}
    _require_known(section, kinds, SECTION)
    return DsWsiConfig(**{name: _policy(kinds[name], values, f"{SECTION}.{name}") for name, values in section.items()})


def is_plan(policy: "PartitionPolicy | PartitionPlan") -> TypeGuard["PartitionPlan"]:
    """Whether the partition is a whole plan, and not a policy."""
    return not isinstance(policy, PartitionPolicy)


def write_section(config: DsWsiConfig) -> dict[str, Any]:
    """The section that `read_section` builds `config` from."""
    section = asdict(config)
    if is_plan(config.partition):
        section["partition"] = {"plan": config.partition.to_section()}
    return section


def _policy(kind: Any, values: Any, key: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{key} must be an object, got {values!r}")
    if kind is PartitionPolicy and "plan" in values:
        return _plan(values, key)
    if kind is TilingPolicy:
        values = stored_tiling(values, key)
    defaults = kind()
    fields_of_kind = {entry.name: getattr(defaults, entry.name) for entry in fields(kind)}
    _require_known(values, fields_of_kind, key)
    fitted = {name: _fit(value, fields_of_kind[name], f"{key}.{name}") for name, value in values.items()}
    try:
        return kind(**fitted)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _plan(values: Mapping[str, Any], key: str) -> "PartitionPlan":
    from ds_wsi.partition.planning.plan import PartitionPlan  # here, because help pages need no torch

    _require_known(values, {"plan": None}, key)
    try:
        return PartitionPlan.from_section(values["plan"])
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{key}.plan must be what `ds-wsi plan` wrote, got {error}. HINT: write it again.") from error


def _fit(value: Any, default: Any, key: str) -> Any:
    """`value` in the type of the policy's default: JSON writes tuples as lists and whole floats as integers."""
    if default is None:  # a number, or left to us
        if isinstance(value, str) and key.endswith("_bytes"):
            return parse_bytes(value, key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{key} must be a whole number or null, got {value!r}")
        return value
    if isinstance(default, tuple) and isinstance(value, list):
        # One entry too many or too few is the policy's to refuse.
        return tuple(
            _fit(item, default[min(index, len(default) - 1)] if default else item, f"{key}[{index}]")
            for index, item in enumerate(value)
        )
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise ValueError(f"{key} must be of type {type(default).__name__}, got {value!r}")
    return value


def _require_known(given: Mapping[str, Any], names: Mapping[str, Any], key: str) -> None:
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(f"{key}.{unknown[0]} must be one of {', '.join(names)}. HINT: check the spelling.")
