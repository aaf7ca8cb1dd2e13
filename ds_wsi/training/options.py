"""The command line's options: each sets one field of the settings, and only those given override the JSON."""

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ds_wsi.config import SECTION, DsWsiConfig, is_plan, read_section
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.setting import FLAG, METAVARS, SWITCH, Setting
from ds_wsi.slides.policy import DEMO_TILE_SIZE_PX
from ds_wsi.training.recipes import RECIPE, recipe_settings, tell_recipe
from ds_wsi.training.setting_list import GROUPS, OPTIONS, SETTINGS, default_words, has_effect, needed_words
from ds_wsi.training.settings import TrainSettings
from ds_wsi.training.settings.demo import demo_defaults
from ds_wsi.training.yaml_config import read_yaml

# The demo has its own, which are training's alone.
OF_THE_DEMO = ("policies.tiling.tile_size_px", "model.encoder", "optim.num_train_epochs")


def add_train_options(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """Add every option in its group, with underscores or dashes; what is not given is absent from the namespace.

    Args:
        parser: the one to add to.
        without: names of options that the parser has already, in another sense.
    """
    parser.usage = f"{parser.prog.replace('%', '%%')} [--option value ...]"
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for name, (field_path, declared, _, group) in OPTIONS.items():
        if name in without:
            continue
        words = f"{declared.help} (default: {default_words(field_path)})".replace("%", "%%")
        how: dict[str, Any] = {"dest": field_path, "default": argparse.SUPPRESS, "help": words}
        action = groups[group].add_argument(
            *spellings(name), **how, **_kind(declared, field_path.split(".")[-1].upper())
        )
        if declared.kind == SWITCH:
            vars(action)["shown"] = f"--{name}, --no_{name}"
            off = {**how, "action": "store_false", "help": argparse.SUPPRESS}
            groups[group].add_argument(*spellings(f"no_{name}"), **off)
    groups["run"].add_argument(
        "--config",
        default=argparse.SUPPRESS,
        metavar="YAML",
        help="file of options and their values, as --write_config writes it; the command line overrides it "
        "(default: none)",
    )
    add_local_rank(parser)


def _kind(declared: Setting, metavar: str) -> dict[str, Any]:
    """The keywords of `add_argument` for what an option takes."""
    kind = declared.kind
    if kind in (FLAG, SWITCH):
        return {"action": "store_true"}
    if isinstance(kind, tuple):
        return {"choices": kind, "type": any_case(kind)}
    how = {"type": kind, "metavar": declared.metavar or METAVARS.get(kind, metavar)}
    return how if declared.bare is None else {**how, "nargs": "?", "const": declared.bare}


def any_case(choices: Sequence[str]) -> Callable[[str], str]:
    """A type of argparse that takes a choice in any case; what is none stays as it is."""
    by_lower_case = {choice.lower(): choice for choice in choices}
    return lambda text: text if text in choices else by_lower_case.get(text.lower(), text)


def add_shared_options(parser: argparse.ArgumentParser, names: Collection[str], default: str | None = None) -> None:
    """Add options of training to another command, under their own names, with the same help and default.

    Args:
        parser: the command's.
        names: keys of `OPTIONS`.
        default: what holds where an option is not given, in words; it is then absent from the namespace. None: the
            default of training.
    """
    for name, (field_path, declared, value, _) in OPTIONS.items():
        if name not in names:
            continue
        words = default or (str(value) if field_path in OF_THE_DEMO else default_words(field_path))
        how: dict[str, Any] = {"default": argparse.SUPPRESS if default else value}
        how["help"] = f"{declared.help} (default: {words})".replace("%", "%%")
        parser.add_argument(*spellings(name), **how, **_kind(declared, name.upper()))


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """What DeepSpeed's launcher adds to a command; the rank comes from the environment."""
    parser.add_argument(*spellings("local_rank"), type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def spellings(name: str) -> list[str]:
    """An option with underscores, as the HF Trainer writes it, and with dashes."""
    return sorted({f"--{name}", f"--{name.replace('_', '-')}"}, reverse=True)


def settings_from(
    options: argparse.Namespace, preset: Mapping[str, Any] | None = None
) -> tuple[TrainSettings, dict[str, Any] | None]:
    """The settings, and the DeepSpeed JSON (or None): options override the JSON, that a YAML, and that a preset.

    Args:
        options: what a parser of `add_train_options` returned.
        preset: field ("optim.learning_rate") -> value, in place of the default.
    """
    from ds_wsi.engines.deepspeed_json.config import read_config  # here: help and misspelt options need no engine

    given = {name: value for name, value in vars(options).items() if "." in name}
    in_yaml = read_yaml(options.config) if "config" in options else {}
    asked = frozenset(given)
    of_recipe = recipe_settings({**in_yaml, **given})
    if of_recipe:
        preset = {**(preset or {}), **of_recipe}
        tell_recipe(of_recipe, str(given.get(RECIPE, in_yaml.get(RECIPE))))
    if in_yaml:
        _require_allowed({path: name for path, name in in_yaml.items() if path not in asked}, options)
    path = given.get("run.deepspeed", in_yaml.get("run.deepspeed"))
    config = None if path is None else read_config(path)
    section = config.get(SECTION, {}) if config else {}
    policies = read_section(section)
    if preset is not None or in_yaml:
        below = {**_giving_way(preset or {}, in_yaml), **in_yaml}
        if "partition" not in section and any(field_path.startswith("policies.partition.") for field_path in in_yaml):
            below.setdefault(PARTITION_MODE, SETTINGS[PARTITION_MODE].default)  # as options have it: a section has none
        whose = "YAML or the preset" if preset and in_yaml else "YAML" if in_yaml else "preset"
        section, given = over_preset(below, config or {}, given, whose)
        policies = read_section(section)
    if "data.manifest" not in given and "tile_size_px" not in section.get("tiling", {}):
        policies = replace(policies, tiling=replace(policies.tiling, tile_size_px=DEMO_TILE_SIZE_PX))
    if preset is None:
        given = {**demo_defaults(given, given.get("data.demo", "plain")), **given}
    settings = TrainSettings(policies=_with_policies(policies, given))
    for group in ("data", "task", "model", "optim", "run"):
        fields = {name.split(".")[1]: value for name, value in given.items() if name.split(".")[0] == group}
        settings = replace(settings, **{group: replace(getattr(settings, group), **fields)})
    _check_effect(asked, {*asked, *in_yaml}, settings)
    return settings, config


def _require_allowed(in_yaml: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Refuse own code that the YAML alone names, before it is imported; see `ds_wsi.models.own`."""
    from ds_wsi.models.own import AGGREGATOR, ENCODER, is_own, require_allowed

    named = {kind: in_yaml[f"model.{kind}"] for kind in (ENCODER, AGGREGATOR) if f"model.{kind}" in in_yaml}
    of_own_code = {kind: name for kind, name in named.items() if is_own(name, kind)}
    require_allowed(of_own_code, vars(options).get("model.allow_code", ()), options.config)


def _check_effect(asked: Collection[str], chosen: Collection[str], settings: TrainSettings) -> None:
    """Refuse two sizes of a step on one command line, and warn of options there, or in a YAML, without effect."""
    if SLIDES_A_STEP in asked and any(field_path in asked for field_path in SLIDES_A_MICRO_STEP):
        raise ValueError(
            "--bags_per_step must not be given with --per_device_train_batch_size or --gradient_accumulation_steps, of "
            "which it takes the place. HINT: leave out one of them; --virtual_workers divides a step."
        )
    for field_path in (field_path for field_path in SETTINGS if field_path in chosen):
        if not has_effect(settings, field_path):
            logger.warning(
                "--%s: without effect, for want of %s", SETTINGS[field_path].setting.option, needed_words(field_path)
            )


# Keys of the DeepSpeed JSON -> the fields that they fix where they are not "auto".
DEEPSPEED_KEYS = {
    "train_micro_batch_size_per_gpu": "optim.per_device_train_batch_size",
    "gradient_accumulation_steps": "optim.gradient_accumulation_steps",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer.type": "optim.optim",
    "optimizer.params.lr": "optim.learning_rate",
    "optimizer.params.weight_decay": "optim.weight_decay",
}
PARTITION_MODE = "policies.partition.mode"
SLIDES_A_STEP = "policies.stacking.bags_per_step"
SLIDES_A_MICRO_STEP = ("optim.per_device_train_batch_size", "optim.gradient_accumulation_steps")


def over_preset(
    preset: Mapping[str, Any], config: Mapping[str, Any], given: Mapping[str, Any], whose: str = "preset"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the JSON and the command line leave of a preset.

    A preset's slides per step give way to a batch size or an accumulation that is given: else these would do nothing.
    Its precision gives way to another.

    Args:
        preset: field -> value.
        config: the DeepSpeed JSON.
        given: field -> value, of the command line.
        whose: what a warning names as the source of the settings of `preset`.

    Returns:
        The "ds_wsi" section with the preset's policies below the JSON's, and the fields of the command line above
        those that the JSON fixes, above the preset's others.
    """
    fixed = {}
    for key, field_path in DEEPSPEED_KEYS.items():
        value: Any = config
        for name in key.split("."):
            value = value.get(name, "auto") if isinstance(value, Mapping) else "auto"
        if value != "auto":
            fixed[field_path] = value.lower() if key == "optimizer.type" else value
    for field_path, value in fixed.items():
        if preset.get(field_path, value) != value and field_path not in given:
            logger.warning(
                "%s is %s as the DeepSpeed JSON has it, the %s has %s", field_path, value, whose, preset[field_path]
            )
    kept = _giving_way(preset, {**fixed, **given})
    policies: dict[str, dict[str, Any]] = {}
    for field_path, value in kept.items():
        group, *path = field_path.split(".")
        if group == "policies":
            policies.setdefault(path[0], {})[path[1]] = value
    in_json = config.get(SECTION, {})
    section = dict(in_json)
    for name, values in policies.items():
        if "plan" not in in_json.get(name, {}):  # a plan is whole
            section[name] = {**values, **in_json.get(name, {})}
    fields = {field_path: value for field_path, value in kept.items() if not field_path.startswith("policies.")}
    return section, {**fields, **fixed, **given}


def _giving_way(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of settings under others that contradict them: another precision, another size of a step."""
    kept = dict(below)
    for precision, other in (("optim.fp16", "optim.bf16"), ("optim.bf16", "optim.fp16")):
        if above.get(other):
            kept.pop(precision, None)
    if any(field_path in above for field_path in SLIDES_A_MICRO_STEP):
        kept.pop(SLIDES_A_STEP, None)
    if SLIDES_A_STEP in above:
        kept = {field_path: value for field_path, value in kept.items() if field_path not in SLIDES_A_MICRO_STEP}
    return kept


def _with_policies(policies: DsWsiConfig, given: dict[str, Any]) -> DsWsiConfig:
    changes: dict[str, dict[str, Any]] = {}
    for field_path, value in given.items():
        group, *path = field_path.split(".")
        if group == "policies":
            changes.setdefault(path[0], {})[path[1]] = value
    for policy, values in changes.items():
        if policy == "partition" and is_plan(policies.partition):
            raise ValueError(
                f"{', '.join(values)} must not be given with a plan in the JSON. HINT: leave out one of them."
            )
        # Together: one may need another.
        policies = replace(policies, **{policy: replace(getattr(policies, policy), **values)})
    return policies
