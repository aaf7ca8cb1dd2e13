"""The command line's options: each sets one field of the settings, and only those given override the JSON."""

import argparse
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from ds_wsi.bags.feature_cohort import CHECKS
from ds_wsi.compression.comm import HOOK_NAMES
from ds_wsi.config import SECTION, DsWsiConfig, read_section
from ds_wsi.engines.kernels import MEMORY_FORMATS, TF32
from ds_wsi.engines.optimizers import OPTIMIZERS
from ds_wsi.evaluation.metrics import METRIC_NAMES
from ds_wsi.models.aggregators import AGGREGATORS
from ds_wsi.models.features import FEATURES
from ds_wsi.norms.policy import EVALUATION as NORM_EVALUATION
from ds_wsi.norms.policy import TRAINING as NORM_TRAINING
from ds_wsi.partition.plan import PartitionPlan
from ds_wsi.partition.policy import POLICY_MODES
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.numerics import PRECISIONS
from ds_wsi.runtime.units import parse_bytes
from ds_wsi.slides.demo import DEMOS
from ds_wsi.slides.tissue import TISSUE_RULES
from ds_wsi.stacking.policy import FRAMEWORKS
from ds_wsi.tile_parallel.policy import EXCHANGES
from ds_wsi.training.optim import SCHEDULES
from ds_wsi.training.settings import TUNED_LEARNING_RATE, TrainSettings

DEMO_TILE_SIZE_PX = 64  # what the demo cohort's regions were drawn for
FLAG = "flag"
SWITCH = "switch"  # a flag that is on, with a --no_ form
ADAM_BETA = 0.9


def tiles_or_all(text: str) -> int | None:
    """A number of tiles, or None for "all"."""
    try:
        return None if text == "all" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number of tiles, or all, got {text!r}") from error


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(name) for name in _names(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be numbers such as 1,2.5, got {text!r}") from error


def size_in_bytes(text: str) -> int:
    """As `parse_bytes`, with its words where argparse would say only that the value is invalid."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def comma_separated(text: str) -> tuple[str, ...]:
    """The parts, without the spaces around them; empty ones stay."""
    return tuple(part.strip() for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in comma_separated(text) if name)


def _assignments(text: str) -> tuple[tuple[str, float | str], ...]:
    """Names and values: numbers, true and false as JSON has them, other words as they are."""
    pairs = []
    for part in _names(text):
        name, sign, word = part.partition("=")
        if not (sign and name.strip() and word.strip()):
            raise argparse.ArgumentTypeError(f"must be name=value pairs such as landmarks=64,heads=4, got {part!r}")
        try:
            value = json.loads(word)
        except json.JSONDecodeError:
            value = word.strip()
        pairs.append((name.strip(), value))
    return tuple(pairs)


# (option, field, type or choices, help); a field is "group.name" of TrainSettings, or "policies.policy.name".
OPTIONS: tuple[tuple[str, str, Any, str], ...] = (
    ("manifest", "data.manifest", str, "CSV (or JSON, Parquet, saved dataset) of slides; without it the demo's"),
    ("demo", "data.demo", tuple(DEMOS), "which demo cohort: of one centre, or of ten whose stains and scanners differ"),
    ("demo_dir", "data.demo_dir", str, "where the demo slides are kept (default: a folder of theirs below runs/)"),
    ("tiles_dir", "data.tiles_dir", str, "where tile grids are kept (default: in the run's folder)"),
    ("features_dir", "data.features_dir", str, "train the aggregator alone, on features there, a file a slide"),
    ("check_features", "data.check_features", CHECKS, "read files of features whole before training, or their heads"),
    ("classes", "data.classes", _names, "class names in the order of the logits, comma-separated"),
    ("positive_class", "data.positive_class", str, "of two classes, that of which f1 is told (default: the second)"),
    ("slide_mpp", "data.slide_mpp", float, "um/px of slides that do not tell theirs: see docs/tissue.md"),
    (
        "tissue_masks",
        "data.tissue_masks",
        str,
        "folder of <slide_id>.geojson (QuPath's) or .png that say where tissue is; slides without one go by --tissue",
    ),
    (
        "masks_in_bounds",
        "data.masks_in_bounds",
        FLAG,
        "the masks' places count from the scanned area's corner, as QuPath's do, and not from level 0's",
    ),
    ("skip_bad_slides", "data.skip_bad_slides", FLAG, "leave out slides that cannot be used, and list them"),
    ("dataset_name", "data.dataset_name", str, "in tables of runs (default: the manifest's, without its suffix)"),
    ("split_name", "data.split_name", str, "which split or fold of the dataset the manifest holds, in tables of runs"),
    ("split_seed", "data.split_seed", int, "of the draw of splits, where the manifest has none; not --seed"),
    ("tile_size_px", "policies.tiling.tile_size_px", int, "side of a tile"),
    ("mpp", "policies.tiling.mpp", float, "um/px at which tiles are read (0.5 is 20x)"),
    ("min_tissue_fraction", "policies.tiling.min_tissue_fraction", float, "of a tile's area that must be tissue"),
    (
        "tissue",
        "policies.tiling.tissue",
        TISSUE_RULES,
        "what finds tissue: the slide's own glass, a grey range, Otsu's threshold, or nothing (every tile is taken)",
    ),
    ("dataloader_num_workers", "policies.reading.workers", int, "processes that read tiles"),
    ("tiles_per_slide", "policies.reading.tiles_per_slide", tiles_or_all, "tiles of each training slide, or all"),
    ("tile_store", "policies.reading.tile_store", str, "folder that `ds-wsi tile --store` wrote, in place of slides"),
    ("max_failed_fraction", "policies.reading.max_failed_fraction", float, "of tiles that may fail to read"),
    ("augment_flips", "policies.augment.flips", SWITCH, "the eight symmetries of a tile"),
    ("augment_colour", "policies.augment.colour", float, "largest relative change of a channel, one draw a slide"),
    ("augment_rotation", "policies.augment.rotation", float, "largest angle in degrees"),
    ("augment_stain", "policies.augment.stain", float, "largest relative change of a stain's amount"),
    ("augment_brightness", "policies.augment.brightness", float, "largest relative change"),
    ("augment_contrast", "policies.augment.contrast", float, "largest relative change"),
    ("augment_saturation", "policies.augment.saturation", float, "largest relative change"),
    ("augment_hue", "policies.augment.hue", float, "largest change, of the colour circle"),
    ("augment_blur", "policies.augment.blur", float, "largest standard deviation in px"),
    ("augment_blur_probability", "policies.augment.blur_probability", float, "of a slide's being blurred"),
    ("partition", "policies.partition.mode", POLICY_MODES, "how the encoder's activations are partitioned"),
    ("partition_chunk_size", "policies.partition.chunk_size", int, "tiles a chunk"),
    ("partition_check", "policies.partition.check", SWITCH, "compare it with the encoder alone at the first call"),
    ("gpu_budget", "policies.partition.gpu_budget_bytes", size_in_bytes, "for activations on the device, as 24GiB"),
    ("host_budget", "policies.partition.host_budget_bytes", size_in_bytes, "for activations in host memory"),
    ("nvme_path", "policies.partition.nvme_path", str, "folder on a local disk for what host memory does not hold"),
    ("nvme_budget", "policies.partition.nvme_budget_bytes", size_in_bytes, "for activations on that disk"),
    ("norm_training", "policies.norm.training", NORM_TRAINING, "what BatchNorm averages over in training"),
    ("norm_evaluation", "policies.norm.evaluation", NORM_EVALUATION, "what it averages over in the exported model"),
    ("norm_affine", "policies.norm.affine", SWITCH, "under --norm_training frozen, train its weights and biases"),
    (
        "norm_recalibration_tiles",
        "policies.norm.recalibration_tiles",
        int,
        "tiles of each training slide over which statistics are taken anew, 0 for all",
    ),
    ("bags_per_step", "policies.stacking.bags_per_step", int, "slides of an optimizer step over all processes"),
    ("virtual_workers", "policies.stacking.virtual_workers", int, "stacks that a process computes in a step"),
    ("max_tiles_per_rank", "policies.stacking.max_tiles_per_rank", int, "tiles of a stack at most"),
    ("framework", "policies.stacking.framework", FRAMEWORKS, "how slides of different length share a step"),
    ("sample_tiles", "policies.stacking.sample_tiles", int, 'tiles of each slide in framework "sampling"'),
    ("tile_parallel_size", "policies.tile_parallel.size", int, "processes that share each slide's tiles"),
    ("tile_parallel_aggregator", "policies.tile_parallel.aggregator", EXCHANGES, "exchange of features between them"),
    ("comm_hook", "policies.compression.hook", HOOK_NAMES, "how gradients go between processes"),
    ("comm_keep", "policies.compression.keep", float, "share of a gradient's entries that topk and dmgc send"),
    ("encoder", "model.encoder", str, "a timm model's name, hf-hub:ORG/NAME or local-dir:PATH"),
    ("encoder_weights", "model.encoder_weights", str, "local .safetensors file or timm checkpoint"),
    ("pretrained", "model.pretrained", FLAG, "weights that timm has for the encoder's name"),
    ("encoder_features", "model.encoder_features", FEATURES, "what leaves the encoder (default: as its authors do)"),
    ("aggregator", "model.aggregator", tuple(AGGREGATORS), "MIL pooling"),
    ("dropout", "model.dropout", float, "of the aggregator"),
    (
        "aggregator_options",
        "model.aggregator_options",
        _assignments,
        "others of the aggregator, as landmarks=64,heads=4",
    ),
    ("freeze_encoder", "model.freeze_encoder", SWITCH, "train the aggregator only"),
    ("freeze_until", "model.freeze_until", str, "first submodule of the encoder that is trained, such as layer3"),
    ("freeze_encoder_epochs", "model.freeze_encoder_epochs", int, "epochs at first that train the aggregator only"),
    ("lora_rank", "model.lora_rank", int, "of adapters that are trained in the encoder's place; 0 has none"),
    ("lora_alpha", "model.lora_alpha", float, "scale of the adapters"),
    ("lora_targets", "model.lora_targets", _names, "linear layers that have them, comma-separated"),
    ("num_train_epochs", "optim.num_train_epochs", int, "passes over the training slides"),
    ("per_device_train_batch_size", "optim.per_device_train_batch_size", int, "slides a process and micro-step"),
    ("gradient_accumulation_steps", "optim.gradient_accumulation_steps", int, "micro-steps an optimizer step"),
    ("learning_rate", "optim.learning_rate", float, "peak learning rate"),
    (
        "encoder_learning_rate",
        "optim.encoder_learning_rate",
        float,
        f"its peak for the encoder (default: the same; for an encoder from weights at most {TUNED_LEARNING_RATE:g})",
    ),
    ("weight_decay", "optim.weight_decay", float, "of the optimizer"),
    ("optim", "optim.optim", tuple(OPTIMIZERS), "optimizer; the DeepSpeed JSON's section decides where it has one"),
    ("momentum", "optim.momentum", float, "of --optim sgd"),
    ("lr_scheduler_type", "optim.lr_scheduler_type", SCHEDULES, "schedule after the warm-up"),
    ("warmup_steps", "optim.warmup_steps", int, "optimizer steps of linear warm-up"),
    ("max_grad_norm", "optim.max_grad_norm", float, "0 clips nothing"),
    ("class_weights", "optim.class_weights", _numbers, "factor of a slide's loss by class, comma-separated"),
    ("ema_decay", "optim.ema_decay", float, "of the moving average of the weights; 0 has none"),
    ("bf16", "optim.bf16", SWITCH, "bfloat16 mixed precision"),
    ("fp16", "optim.fp16", SWITCH, "float16 mixed precision"),
    ("output_dir", "run.output_dir", str, "the run's folder (default: a new one below runs/)"),
    ("seed", "run.seed", int, "of everything random"),
    ("save_steps", "run.save_steps", int, "steps between checkpoints within an epoch; 0: ends of epochs only"),
    ("save_total_limit", "run.save_total_limit", int, "checkpoints kept"),
    ("metric_for_best_model", "run.metric_for_best_model", METRIC_NAMES, "validation metric that chooses the epoch"),
    ("validate_beside", "run.validate_beside", FLAG, "validate each epoch while the next one trains"),
    ("validation_device", "run.validation_device", str, "of that validation, as cuda:1 (default: the main process's)"),
    ("early_stopping_patience", "run.early_stopping_patience", int, "epochs without improvement that stop; 0: none"),
    ("ddp_timeout", "run.ddp_timeout", int, "seconds that a collective waits for the other processes"),
    ("eval_tiles", "run.eval_tiles", tiles_or_all, "random tiles of each test slide, or all (the default)"),
    ("eval_runs", "run.eval_runs", int, "draws of --eval_tiles, over which the test metrics are averaged"),
    ("eval_seed", "run.eval_seed", int, "of those draws"),
    (
        "eval_precision",
        "run.eval_precision",
        tuple(PRECISIONS),
        "mixed precision of the encoder in validation and test",
    ),
    ("tf32", "run.tf32", TF32, "round factors of float32 products to TF32 on a GPU; torch leaves torch's setting"),
    (
        "memory_format",
        "run.memory_format",
        MEMORY_FORMATS,
        "of tiles; auto takes the faster by a trial on a GPU",
    ),
    ("heatmaps", "run.heatmaps", int, "test slides that get a heat map, the first ones; 0 draws none (default: all)"),
    ("disable_tqdm", "run.disable_tqdm", FLAG, "neither bars nor lines of progress"),
    ("fsdp", "run.fsdp", FLAG, "shard the model over the processes with FSDP2"),
    ("deepspeed", "run.deepspeed", str, 'a DeepSpeed JSON; its "ds_wsi" section sets the policies'),
)


OPTION_OF = {place: name for name, place, _, _ in OPTIONS}


def add_train_options(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """Add every option, with underscores or dashes; what is not given is absent from the namespace.

    Args:
        parser: to add to.
        without: names of options that the parser has already, in another sense.
    """
    for name, place, kind, text in OPTIONS:
        if name in without:
            continue
        leaf, default = place.split(".")[-1], default_of(place)
        if default not in (None, ()) and kind != FLAG:
            text = f"{text} (default: {default})"
        how: dict[str, Any] = {"dest": place, "default": argparse.SUPPRESS, "help": text}
        if kind in (FLAG, SWITCH):
            how["action"] = "store_true"
        elif isinstance(kind, tuple):
            how["choices"] = kind
        else:
            how |= {"type": kind, "metavar": leaf.upper()}
        parser.add_argument(*spellings(name), **how)
        if kind == SWITCH:
            off = {**how, "action": "store_false", "help": f"without: {text}"}
            parser.add_argument(*spellings(f"no_{name}"), **off)
    parser.add_argument(
        *spellings("resume_from_checkpoint"),
        dest="run.resume_from_checkpoint",
        nargs="?",
        const="latest",
        default=argparse.SUPPRESS,
        metavar="PATH",
        help="go on with a run: a checkpoint's folder, or without a path the newest whole one of --output_dir",
    )
    parser.add_argument(
        *spellings("demon"),
        dest="optim.demon",
        nargs="?",
        type=float,
        const=ADAM_BETA,
        default=argparse.SUPPRESS,
        metavar="BETA",
        help=f"take Adam's first beta from BETA (without a value {ADAM_BETA}) down to 0 over the run",
    )
    add_local_rank(parser)


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
        words = default or ("" if kind == FLAG or value is None else str(value))
        how: dict[str, Any] = {"default": argparse.SUPPRESS if default else value}
        how["help"] = f"{text} (default: {words})" if words else text
        if kind == FLAG:
            how["action"] = "store_true"
        elif isinstance(kind, tuple):
            how["choices"] = kind
        else:
            how["type"] = kind
        parser.add_argument(*spellings(name), **how)


def default_of(place: str) -> Any:
    """The default of a field of the settings, "group.name" or "policies.policy.name"."""
    value: Any = TrainSettings()
    for name in place.split("."):
        value = getattr(value, name)
    return value


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
    from ds_wsi.engines.deepspeed import read_config  # here, for help and misspelt options need no engine

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
