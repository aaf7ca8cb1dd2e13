"""The command line's options: each sets one field of the settings, and only those given override the JSON."""

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ds_wsi.config import SECTION, DsWsiConfig, read_section
from ds_wsi.partition.planning.plan import PartitionPlan
from ds_wsi.runtime.log import logger
from ds_wsi.training.option_list import (
    ADAM_BETA,
    DEMO_TILE_SIZE_PX,
    FLAG,
    GROUPS,
    OPTIONS,
    SWITCH,
    comma_separated,
    default_of,
    default_words,
    group_of,
    size_in_bytes,
    tiles_or_all,
)
from ds_wsi.training.settings import TrainSettings

__all__ = [
    "DEMO_TILE_SIZE_PX",
    "OPTIONS",
    "OPTION_OF",
    "add_local_rank",
    "add_shared_options",
    "add_train_options",
    "any_case",
    "comma_separated",
    "default_of",
    "over_preset",
    "settings_from",
    "size_in_bytes",
    "spellings",
    "tiles_or_all",
]

OPTION_OF = {place: name for name, place, _, _ in OPTIONS}


def add_train_options(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """Add every option in its group, with underscores or dashes; what is not given is absent from the namespace.

    Args:
        parser: to add to.
        without: names of options that the parser has already, in another sense.
    """
    parser.usage = f"{parser.prog.replace('%', '%%')} [--option value ...]"
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for name, place, kind, text in OPTIONS:
        if name in without:
            continue
        words = f"{text} (default: {default_words(place)})".replace("%", "%%")
        how: dict[str, Any] = {"dest": place, "default": argparse.SUPPRESS, "help": words}
        group = groups[group_of(place)]
        action = group.add_argument(*spellings(name), **how, **_kind(kind, place.split(".")[-1].upper()))
        if kind == SWITCH:
            vars(action)["shown"] = f"--{name}, --no_{name}"
            off = {**how, "action": "store_false", "help": argparse.SUPPRESS}
            group.add_argument(*spellings(f"no_{name}"), **off)
    groups["run"].add_argument(
        *spellings("resume_from_checkpoint"),
        dest="run.resume_from_checkpoint",
        nargs="?",
        const="latest",
        default=argparse.SUPPRESS,
        metavar="PATH",
        help="go on with a run: a checkpoint's folder, or without a path the newest whole one of --output_dir "
        "(default: a new run)",
    )
    groups["training"].add_argument(
        *spellings("demon"),
        dest="optim.demon",
        nargs="?",
        type=float,
        const=ADAM_BETA,
        default=argparse.SUPPRESS,
        metavar="BETA",
        help=f"let Adam's momentum decay (DEMON): its first beta goes from BETA, {ADAM_BETA} without a value, to 0 "
        "over the run (default: off)",
    )
    add_local_rank(parser)


METAVARS: dict[Any, str] = {int: "N", float: "X", size_in_bytes: "SIZE", tiles_or_all: "N|all"}


def _kind(kind: Any, metavar: str) -> dict[str, Any]:
    """The keywords of `add_argument` for what an option takes."""
    if kind in (FLAG, SWITCH):
        return {"action": "store_true"}
    if isinstance(kind, tuple):
        return {"choices": kind, "type": any_case(kind)}
    return {"type": kind, "metavar": METAVARS.get(kind, metavar)}


def any_case(choices: Sequence[str]) -> Callable[[str], str]:
    """A type of argparse that takes a choice in any case; what is none stays as it is."""
    known = {choice.lower(): choice for choice in choices}
    return lambda text: text if text in choices else known.get(text.lower(), text)


def add_shared_options(parser: argparse.ArgumentParser, names: Collection[str], default: str | None = None) -> None:
    """Add options of training to another command, under their own names, with the same help and default.

    Args:
        parser: of the command.
        names: of `OPTIONS`.
        default: what holds where an option is not given, in words; it is then absent from the namespace. None: the
            default of training.
    """
    for name, place, kind, text in OPTIONS:
        if name not in names:
            continue
        value = default_of(place)
        # The demo's own size is training's alone.
        words = default or (str(value) if place == "policies.tiling.tile_size_px" else default_words(place))
        how: dict[str, Any] = {"default": argparse.SUPPRESS if default else value}
        how["help"] = f"{text} (default: {words})".replace("%", "%%")
        parser.add_argument(*spellings(name), **how, **_kind(kind, name.upper()))


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """What DeepSpeed's launcher adds to a command; the rank comes from the environment."""
    parser.add_argument(*spellings("local_rank"), type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def spellings(name: str) -> list[str]:
    """An option with underscores, as the HF Trainer writes it, and with dashes."""
    return sorted({f"--{name}", f"--{name.replace('_', '-')}"}, reverse=True)


def settings_from(
    options: argparse.Namespace, preset: Mapping[str, Any] | None = None
) -> tuple[TrainSettings, dict[str, Any] | None]:
    """The settings, and the DeepSpeed JSON (or None): options override the JSON, and the JSON a preset.

    Args:
        options: of `add_train_options`.
        preset: field ("optim.learning_rate") -> value, in place of the default.
    """
    from ds_wsi.engines.deepspeed_json.config import read_config  # here, for help and misspelt options need no engine

    given = {name: value for name, value in vars(options).items() if "." in name}
    asked = frozenset(given)
    config = read_config(given["run.deepspeed"]) if "run.deepspeed" in given else None
    section = config.get(SECTION, {}) if config else {}
    policies = read_section(section)
    if preset is not None:
        section, given = over_preset(preset, config or {}, given)
        policies = read_section(section)
    if "data.manifest" not in given and "tile_size_px" not in section.get("tiling", {}):
        policies = replace(policies, tiling=replace(policies.tiling, tile_size_px=DEMO_TILE_SIZE_PX))
    settings = TrainSettings(policies=_with_policies(policies, given))
    for group in ("data", "model", "optim", "run"):
        fields = {name.split(".")[1]: value for name, value in given.items() if name.split(".")[0] == group}
        settings = replace(settings, **{group: replace(getattr(settings, group), **fields)})
    _check_effect(asked, settings)
    return settings, config


# Field -> the option without which it does nothing, and whether that is in force.
EFFECTIVE_WITH: Mapping[str, tuple[str, Callable[[TrainSettings], bool]]] = {
    "model.lora_alpha": ("--lora_rank", lambda settings: settings.model.lora_rank > 0),
    "model.lora_targets": ("--lora_rank", lambda settings: settings.model.lora_rank > 0),
    "policies.stacking.sample_tiles": (
        "--framework sampling",
        lambda settings: settings.policies.stacking.framework == "sampling",
    ),
    "policies.compression.keep": (
        "--comm_hook topk, dmgc or auto",
        lambda settings: settings.policies.compression.hook in ("topk", "dmgc", "auto"),
    ),
    "policies.augment.blur_probability": ("--augment_blur", lambda settings: settings.policies.augment.blur > 0),
}


def _check_effect(asked: Collection[str], settings: TrainSettings) -> None:
    """Refuse two sizes of a step on one command line, and warn of options without effect."""
    if SLIDES_A_STEP in asked and any(place in asked for place in SLIDES_A_MICRO_STEP):
        raise ValueError(
            "--bags_per_step must not be given with --per_device_train_batch_size or --gradient_accumulation_steps, of "
            "which it takes the place. HINT: leave out one of them; --virtual_workers divides a step."
        )
    for place, (needed, in_force) in EFFECTIVE_WITH.items():
        if place in asked and not in_force(settings):
            logger.warning("--%s: without effect, for want of %s", OPTION_OF[place], needed)


# Keys of the DeepSpeed JSON -> the fields that they fix where they are not "auto".
DEEPSPEED_KEYS = {
    "train_micro_batch_size_per_gpu": "optim.per_device_train_batch_size",
    "gradient_accumulation_steps": "optim.gradient_accumulation_steps",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer.type": "optim.optim",
    "optimizer.params.lr": "optim.learning_rate",
    "optimizer.params.weight_decay": "optim.weight_decay",
}
SLIDES_A_STEP = "policies.stacking.bags_per_step"
SLIDES_A_MICRO_STEP = ("optim.per_device_train_batch_size", "optim.gradient_accumulation_steps")


def over_preset(
    preset: Mapping[str, Any], config: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the JSON and the command line leave of a preset.

    A preset's slides a step give way to a batch size or an accumulation that is given: else these would do nothing. Its
    precision gives way to another.

    Args:
        preset: field -> value.
        config: the DeepSpeed JSON.
        given: field -> value, of the command line.

    Returns:
        The "ds_wsi" section with the preset's policies below the JSON's, and the fields of the command line above
        those that the JSON fixes, above the preset's others.
    """
    fixed = {}
    for key, place in DEEPSPEED_KEYS.items():
        value: Any = config
        for name in key.split("."):
            value = value.get(name, "auto") if isinstance(value, Mapping) else "auto"
        if value != "auto":
            fixed[place] = value.lower() if key == "optimizer.type" else value
    for place, value in fixed.items():
        if preset.get(place, value) != value and place not in given:
            logger.warning("%s is %s as the DeepSpeed JSON has it, the preset has %s", place, value, preset[place])
    kept = dict(preset)
    for ours, theirs in (("optim.fp16", "optim.bf16"), ("optim.bf16", "optim.fp16")):
        if given.get(theirs):
            kept.pop(ours, None)
    if any(place in given or place in fixed for place in SLIDES_A_MICRO_STEP):
        kept.pop(SLIDES_A_STEP, None)
    policies: dict[str, dict[str, Any]] = {}
    for place, value in kept.items():
        group, *path = place.split(".")
        if group == "policies":
            policies.setdefault(path[0], {})[path[1]] = value
    own = config.get(SECTION, {})
    section = dict(own)
    for name, values in policies.items():
        if "plan" not in own.get(name, {}):  # a plan is whole
            section[name] = {**values, **own.get(name, {})}
    fields = {place: value for place, value in kept.items() if not place.startswith("policies.")}
    return section, {**fields, **fixed, **given}


def _with_policies(policies: DsWsiConfig, given: dict[str, Any]) -> DsWsiConfig:
    changes: dict[str, dict[str, Any]] = {}
    for place, value in given.items():
        group, *path = place.split(".")
        if group == "policies":
            changes.setdefault(path[0], {})[path[1]] = value
    for policy, values in changes.items():
        if isinstance(getattr(policies, policy), PartitionPlan):
            raise ValueError(
                f"{', '.join(values)} must not be given with a plan in the JSON. HINT: leave out one of them."
            )
        # Together: one may need another.
        policies = replace(policies, **{policy: replace(getattr(policies, policy), **values)})
    return policies
