"""The DeepSpeed JSON, its "auto" values filled from the run's settings; what its buckets cost."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_wsi.engines.machine.cpu import without_gpu
from ds_wsi.engines.machine.ops import choose_adam
from ds_wsi.runtime.files import read_file
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.seams import check_seams

DEFAULT_BUCKET = 500_000_000  # gradients, where the config says nothing
_SECTION: tuple[Any, str] = (Mapping, "an object")
# Those above come first: what lies below them is looked for in an object.
_KINDS: Mapping[str, tuple[Any, str]] = {
    "optimizer": _SECTION,
    "optimizer.params": _SECTION,
    "optimizer.type": (str, "a name"),
    "zero_optimization": _SECTION,
    "zero_optimization.stage": (int, "0 to 3"),
    "zero_optimization.reduce_bucket_size": ((int, float, str), "a number"),
    "zero_optimization.offload_optimizer": _SECTION,
    "zero_optimization.offload_param": _SECTION,
    "fp16": _SECTION,
    "bf16": _SECTION,
}
_GRADIENT_BYTES = 4  # mixed precision is by autocast: they are float32


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON.

    Raises:
        ValueError: missing, not JSON (with the place), or not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"the DeepSpeed config must be a file, got {path} (missing). HINT: check --deepspeed.")
    try:
        config = json.loads(read_file(path).decode())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"the DeepSpeed config must be JSON, got {error.msg} ({path}, line {error.lineno}, column {error.colno})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the DeepSpeed config must be JSON in UTF-8, got {error} ({path})") from error
    if not isinstance(config, dict):
        raise ValueError(f"the DeepSpeed config must be a JSON object, got {type(config).__name__} ({path})")
    require_kinds(config)
    return config


def require_kinds(config: Mapping[str, Any]) -> None:
    """Refuse values of another kind under the keys that are looked into before DeepSpeed reads them.

    Raises:
        ValueError: names the key and the value.
    """
    for key, (kind, words) in _KINDS.items():
        value: Any = config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{key} of the DeepSpeed config must be {words}, got {json.dumps(value)}")
    stage = (config.get("zero_optimization") or {}).get("stage", 0)
    if stage is None or not 0 <= stage <= 3:
        raise ValueError(f"zero_optimization.stage of the DeepSpeed config must be 0 to 3, got {json.dumps(stage)}")


def fill_auto(
    config: dict[str, Any], values: dict[str, Any], options: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return `config` with the run's settings in place of "auto" and of absent keys.

    Args:
        config: DeepSpeed's config.
        values: dotted key -> the run's value. Optimizer keys are filled only where the section is there.
        options: dotted key -> the command line's option, for the remedy.

    Raises:
        ValueError: the config fixes a key to another value than the run's; names the key and both.
    """
    filled = json.loads(json.dumps(config))
    for key, value in values.items():
        *parents, leaf = key.split(".")
        if parents and parents[0] not in filled:
            continue
        section = filled
        for parent in parents:
            section = section.setdefault(parent, {})
        present = section.get(leaf, "auto")
        if present not in ("auto", value):
            option = (options or {}).get(key)
            remedy = f"give {option} {present}" if option else "leave it out"
            raise ValueError(
                f'{key} of the DeepSpeed config must be "auto" or the run\'s value, {value}, got {present}. '
                f'HINT: write "auto", or {remedy}.'
            )
        section[leaf] = value
    return filled


def suit_machine(config: dict[str, Any]) -> None:
    """Take the Adam that this machine can build, in place in `config`, and tell what the buckets cost its GPU."""
    require_kinds(config)
    check_seams("deepspeed", "zero3", "ops")
    choose_adam(config)
    words = bucket_words(config)
    if words and not without_gpu():
        logger.info("%s", words)


def bucket_bytes(config: dict[str, Any]) -> int:
    """Device memory that ZeRO takes for gradients on their way between ranks, however few the model has.

    Twice a bucket where communication overlaps backward: one is filled while the other is sent. At stage 3 it is one.
    """
    zero = config.get("zero_optimization") or {}
    stage, size = zero.get("stage", 0), zero.get("reduce_bucket_size", DEFAULT_BUCKET)
    if stage == 0 or not zero.get("contiguous_gradients", True) or isinstance(size, str):  # "auto", or none
        return 0
    buckets = 2 if stage < 3 and zero.get("overlap_comm") else 1
    return buckets * int(size) * _GRADIENT_BYTES


def bucket_words(config: dict[str, Any]) -> str:
    """What DeepSpeed's own size of a bucket costs, and the key that lowers it; empty where the config names a size."""
    cost = bucket_bytes(config)
    if not cost or "reduce_bucket_size" in config["zero_optimization"]:
        return ""
    return (
        f"ZeRO's buckets take {cost / 2**30:.1f} GiB of the device, by DeepSpeed's default. HINT: "
        '"zero_optimization": {"reduce_bucket_size": 5e7}, and without "overlap_comm" on one GPU, take 0.2 GiB.'
    )
