"""The options of training: each sets one field of the settings; what they are called, take and say."""

import argparse
import json
from typing import Any

from ds_wsi.bags.feature_cohort import CHECKS
from ds_wsi.compression.comm import HOOK_NAMES
from ds_wsi.engines.accelerator.optimizers import OPTIMIZERS
from ds_wsi.engines.machine.kernels import MEMORY_FORMATS, TF32
from ds_wsi.evaluation.metrics import METRIC_NAMES
from ds_wsi.models.aggregators import AGGREGATORS
from ds_wsi.models.features import FEATURES
from ds_wsi.norms.policy import EVALUATION as NORM_EVALUATION
from ds_wsi.norms.policy import TRAINING as NORM_TRAINING
from ds_wsi.partition.policy import POLICY_MODES
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
    (
        "manifest",
        "data.manifest",
        str,
        "table of the slides: CSV, JSON, Parquet or a saved dataset; docs/tables.md has its columns",
    ),
    (
        "demo",
        "data.demo",
        tuple(DEMOS),
        "demo cohort to train on without --manifest: of one centre, of ten whose stains and scanners differ, or "
        "of these with tumours that are harder to see",
    ),
    ("demo_dir", "data.demo_dir", str, "folder that keeps the demo slides"),
    (
        "tiles_dir",
        "data.tiles_dir",
        str,
        "folder that keeps each slide's tile coordinates, so that another run need not look for them again",
    ),
    (
        "features_dir",
        "data.features_dir",
        str,
        "train the aggregator alone, on the features in this folder, a file a slide",
    ),
    (
        "check_features",
        "data.check_features",
        CHECKS,
        "whether every file of features is read whole before training (full), or its head alone (shapes)",
    ),
    (
        "classes",
        "data.classes",
        _names,
        "names of the classes in the order of the model's outputs, comma-separated, such as normal,tumor",
    ),
    (
        "positive_class",
        "data.positive_class",
        str,
        "class whose F1 is told, where there are two; it becomes the second",
    ),
    (
        "slide_mpp",
        "data.slide_mpp",
        float,
        "resolution in um/px of slides whose files do not tell theirs, such as 0.25",
    ),
    (
        "tissue_masks",
        "data.tissue_masks",
        str,
        "folder of masks, <slide_id>.geojson (QuPath's) or .png, that say where tissue is; slides without one go "
        "by --tissue",
    ),
    (
        "masks_in_bounds",
        "data.masks_in_bounds",
        FLAG,
        "count the masks' places from the scanned area's corner, as QuPath does, and not from level 0's",
    ),
    ("skip_bad_slides", "data.skip_bad_slides", FLAG, "leave out slides that cannot be used, and list them"),
    ("dataset_name", "data.dataset_name", str, "name of the dataset in tables of runs"),
    (
        "split_name",
        "data.split_name",
        str,
        "name of the split or fold that the manifest holds, such as fold_0, in tables of runs",
    ),
    (
        "split_seed",
        "data.split_seed",
        int,
        "seed of the draw of train, validation and test, where the manifest has no splits; --seed has no part in it",
    ),
    ("tile_size_px", "policies.tiling.tile_size_px", int, "side of a tile in px"),
    ("mpp", "policies.tiling.mpp", float, "resolution in um/px at which tiles are read: 0.5 is 20x, 0.25 is 40x"),
    (
        "min_tissue_fraction",
        "policies.tiling.min_tissue_fraction",
        float,
        "share of a tile's area, 0 to 1, that must be tissue",
    ),
    (
        "tissue",
        "policies.tiling.tissue",
        TISSUE_RULES,
        "what finds tissue: the slide's own glass, a grey range, Otsu's threshold, or nothing (every tile is taken)",
    ),
    (
        "dataloader_num_workers",
        "policies.reading.workers",
        int,
        "number of processes that read tiles beside the one that trains",
    ),
    (
        "tiles_per_slide",
        "policies.reading.tiles_per_slide",
        tiles_or_all,
        "number of tiles that are drawn of each training slide in each epoch, such as 512, or all",
    ),
    (
        "tile_store",
        "policies.reading.tile_store",
        str,
        "folder that `ds-wsi tile --store` wrote: tiles are read from it in place of the slides",
    ),
    (
        "max_failed_fraction",
        "policies.reading.max_failed_fraction",
        float,
        "share of all tiles, 0 to 1, that may fail to be read before the run stops",
    ),
    (
        "read_timeout",
        "policies.reading.timeout_s",
        float,
        "seconds that tiles which are due are waited for before the command gives up; 0 waits for ever",
    ),
    (
        "augment_flips",
        "policies.augment.flips",
        SWITCH,
        "draw one of the eight symmetries (flips and quarter turns) for each tile",
    ),
    (
        "augment_colour",
        "policies.augment.colour",
        float,
        "largest relative change of a colour channel, one draw a slide; 0.1 is 10%",
    ),
    ("augment_rotation", "policies.augment.rotation", float, "largest angle, in degrees, by which a tile is turned"),
    (
        "augment_stain",
        "policies.augment.stain",
        float,
        "largest relative change of a stain's amount, haematoxylin or eosin, one draw a slide",
    ),
    (
        "augment_brightness",
        "policies.augment.brightness",
        float,
        "largest relative change of the brightness, one draw a slide",
    ),
    (
        "augment_contrast",
        "policies.augment.contrast",
        float,
        "largest relative change of the contrast, one draw a slide",
    ),
    (
        "augment_saturation",
        "policies.augment.saturation",
        float,
        "largest relative change of the saturation, one draw a slide",
    ),
    (
        "augment_hue",
        "policies.augment.hue",
        float,
        "largest turn of the hue, as a share of the colour circle, 0 to 0.5, one draw a slide",
    ),
    (
        "augment_blur",
        "policies.augment.blur",
        float,
        "largest standard deviation, in px, of a Gaussian blur, one draw a slide",
    ),
    (
        "augment_blur_probability",
        "policies.augment.blur_probability",
        float,
        "probability, 0 to 1, that a slide is blurred at all",
    ),
    (
        "partition",
        "policies.partition.mode",
        POLICY_MODES,
        "how the encoder's activations are fitted into memory: native computes a bag as it is, auto plans within "
        "--gpu_budget, the others are parts of such a plan",
    ),
    (
        "partition_chunk_size",
        "policies.partition.chunk_size",
        int,
        "number of tiles that the encoder computes at a time",
    ),
    (
        "partition_check",
        "policies.partition.check",
        SWITCH,
        "compare the partitioned encoder with the encoder alone at the first call",
    ),
    (
        "gpu_budget",
        "policies.partition.gpu_budget_bytes",
        size_in_bytes,
        "memory for activations on the device, such as 24GiB",
    ),
    (
        "host_budget",
        "policies.partition.host_budget_bytes",
        size_in_bytes,
        "memory for activations on the host, such as 128GiB",
    ),
    (
        "nvme_path",
        "policies.partition.nvme_path",
        str,
        "folder on a local disk for activations that the host's memory does not hold",
    ),
    (
        "nvme_budget",
        "policies.partition.nvme_budget_bytes",
        size_in_bytes,
        "room for activations on that disk, such as 500GiB",
    ),
    (
        "norm_training",
        "policies.norm.training",
        NORM_TRAINING,
        "what the encoder's BatchNorm averages over in training: each bag, a stack of bags, a step's bags, or "
        "nothing (frozen); auto decides by the weights, see docs/batchnorm.md",
    ),
    (
        "norm_evaluation",
        "policies.norm.evaluation",
        NORM_EVALUATION,
        "what the encoder's BatchNorm averages over in the exported model; auto takes the best on validation slides",
    ),
    (
        "norm_affine",
        "policies.norm.affine",
        SWITCH,
        "train the weights and biases of BatchNorm under --norm_training frozen",
    ),
    (
        "norm_recalibration_tiles",
        "policies.norm.recalibration_tiles",
        int,
        "number of tiles of each training slide over which BatchNorm's statistics are taken anew; 0 takes all",
    ),
    (
        "bags_per_step",
        "policies.stacking.bags_per_step",
        int,
        "number of slides of an optimizer step over all processes, such as 32, however many processes there are",
    ),
    (
        "virtual_workers",
        "policies.stacking.virtual_workers",
        int,
        "number of stacks of slides that each process computes one after the other in a step of --bags_per_step",
    ),
    (
        "max_tiles_per_rank",
        "policies.stacking.max_tiles_per_rank",
        int,
        "largest number of tiles of a stack, of --bags_per_step; a slide with more is refused",
    ),
    (
        "framework",
        "policies.stacking.framework",
        FRAMEWORKS,
        "how slides of different length share a step: one after the other in stacks, padded, or sampled to one length",
    ),
    ("sample_tiles", "policies.stacking.sample_tiles", int, "number of tiles of each slide in --framework sampling"),
    (
        "tile_parallel_size",
        "policies.tile_parallel.size",
        int,
        "number of processes that share the tiles of each slide",
    ),
    (
        "tile_parallel_aggregator",
        "policies.tile_parallel.aggregator",
        EXCHANGES,
        "how processes that share a slide exchange its features",
    ),
    (
        "comm_hook",
        "policies.compression.hook",
        HOOK_NAMES,
        "how gradients go between processes: whole, or compressed (topk, dmgc); auto measures the link",
    ),
    (
        "comm_keep",
        "policies.compression.keep",
        float,
        "share of a gradient's entries, 0 to 1, that --comm_hook topk and dmgc send",
    ),
    (
        "encoder",
        "model.encoder",
        str,
        "encoder of the tiles: a timm model's name such as resnet50, hf-hub:ORG/NAME, or local-dir:PATH",
    ),
    (
        "encoder_weights",
        "model.encoder_weights",
        str,
        "file the encoder starts from: .safetensors, or a timm checkpoint",
    ),
    ("pretrained", "model.pretrained", FLAG, "start the encoder from the weights that timm has for its name"),
    ("encoder_features", "model.encoder_features", FEATURES, "what leaves the encoder for each tile"),
    (
        "aggregator",
        "model.aggregator",
        tuple(AGGREGATORS),
        "MIL pooling that turns a slide's features into its prediction",
    ),
    ("dropout", "model.dropout", float, "dropout of the aggregator, 0 to 1"),
    (
        "aggregator_options",
        "model.aggregator_options",
        _assignments,
        "further options of the aggregator, name=value and comma-separated, such as landmarks=64,heads=4",
    ),
    ("freeze_encoder", "model.freeze_encoder", SWITCH, "train the aggregator only"),
    (
        "freeze_until",
        "model.freeze_until",
        str,
        "first submodule of the encoder that is trained, such as layer3; those before it are frozen",
    ),
    (
        "freeze_encoder_epochs",
        "model.freeze_encoder_epochs",
        int,
        "number of first epochs that train the aggregator only",
    ),
    ("lora_rank", "model.lora_rank", int, "rank of LoRA adapters that are trained in the encoder's place; 0 has none"),
    ("lora_alpha", "model.lora_alpha", float, "scale of the LoRA adapters, over their rank"),
    (
        "lora_targets",
        "model.lora_targets",
        _names,
        "names of the linear layers that get LoRA adapters, comma-separated",
    ),
    ("num_train_epochs", "optim.num_train_epochs", int, "number of passes over the training slides"),
    (
        "per_device_train_batch_size",
        "optim.per_device_train_batch_size",
        int,
        "number of slides that a process computes in a micro-step",
    ),
    (
        "gradient_accumulation_steps",
        "optim.gradient_accumulation_steps",
        int,
        "number of micro-steps of an optimizer step",
    ),
    ("learning_rate", "optim.learning_rate", float, "peak of the learning rate, reached after --warmup_steps"),
    ("encoder_learning_rate", "optim.encoder_learning_rate", float, "peak of the encoder's learning rate"),
    ("weight_decay", "optim.weight_decay", float, "weight decay of the optimizer"),
    (
        "optim",
        "optim.optim",
        tuple(OPTIMIZERS),
        "optimizer; the DeepSpeed JSON's section `optimizer` decides where it has one",
    ),
    ("momentum", "optim.momentum", float, "momentum of --optim sgd, 0 to 1"),
    ("lr_scheduler_type", "optim.lr_scheduler_type", SCHEDULES, "how the learning rate falls after the warm-up"),
    (
        "warmup_steps",
        "optim.warmup_steps",
        int,
        "number of optimizer steps in which the learning rate rises to its peak",
    ),
    (
        "max_grad_norm",
        "optim.max_grad_norm",
        float,
        "largest norm of the gradient, to which a larger one is scaled down; 0 clips nothing",
    ),
    (
        "class_weights",
        "optim.class_weights",
        _numbers,
        "factor of a slide's loss for each class, comma-separated in the classes' order, such as 1,2.5",
    ),
    (
        "ema_decay",
        "optim.ema_decay",
        float,
        "decay, 0 to 1, of a moving average of the weights, which is then validated and exported; 0 has none",
    ),
    ("bf16", "optim.bf16", SWITCH, "train in bfloat16 mixed precision"),
    ("fp16", "optim.fp16", SWITCH, "train in float16 mixed precision"),
    (
        "output_dir",
        "run.output_dir",
        str,
        "folder of the run: new, empty, or the run's own with --resume_from_checkpoint",
    ),
    ("seed", "run.seed", int, "seed of the weights, the order of the slides and every draw but that of the splits"),
    (
        "save_steps",
        "run.save_steps",
        int,
        "number of optimizer steps between checkpoints within an epoch; 0 leaves them to --save_minutes",
    ),
    (
        "save_minutes",
        "run.save_minutes",
        float,
        "minutes after which a checkpoint is written within an epoch too; 0 saves at the ends of epochs only",
    ),
    (
        "max_minutes",
        "run.max_minutes",
        float,
        "minutes after which the run stops with a checkpoint and exit status 75; the same command goes on; 0: never",
    ),
    ("save_total_limit", "run.save_total_limit", int, "number of checkpoints that are kept, the newest"),
    (
        "save_beside",
        "run.save_beside",
        SWITCH,
        "write checkpoints while the training goes on, from a copy in host memory",
    ),
    (
        "metric_for_best_model",
        "run.metric_for_best_model",
        METRIC_NAMES,
        "validation metric whose best epoch is exported",
    ),
    (
        "validate_beside",
        "run.validate_beside",
        FLAG,
        "validate each epoch in a process of its own while the next one trains",
    ),
    ("validation_device", "run.validation_device", str, "device of --validate_beside, such as cuda:1"),
    (
        "early_stopping_patience",
        "run.early_stopping_patience",
        int,
        "number of epochs without a better --metric_for_best_model that end the run; 0 goes on",
    ),
    ("ddp_timeout", "run.ddp_timeout", int, "seconds that a process waits for the others before it gives up"),
    ("eval_tiles", "run.eval_tiles", tiles_or_all, "number of random tiles of each test slide, such as 256, or all"),
    ("eval_runs", "run.eval_runs", int, "number of draws of --eval_tiles, over which the test metrics are averaged"),
    ("eval_seed", "run.eval_seed", int, "seed of the draws of --eval_tiles"),
    (
        "eval_precision",
        "run.eval_precision",
        tuple(PRECISIONS),
        "precision in which the encoder computes validation and test; no is float32",
    ),
    (
        "tf32",
        "run.tf32",
        TF32,
        "whether a GPU rounds factors of float32 products to TF32; torch leaves torch's setting",
    ),
    (
        "memory_format",
        "run.memory_format",
        MEMORY_FORMATS,
        "memory layout of the encoder's convolutions; auto takes the faster one by a trial on a GPU",
    ),
    ("heatmaps", "run.heatmaps", int, "number of test slides that get a heat map, the first ones; 0 draws none"),
    ("disable_tqdm", "run.disable_tqdm", FLAG, "show neither bars nor lines of progress"),
    ("fsdp", "run.fsdp", FLAG, "shard the model over the processes with FSDP2"),
    (
        "deepspeed",
        "run.deepspeed",
        str,
        'DeepSpeed JSON, whose section "ds_wsi" sets the policies; options override it',
    ),
)


# Group of the help page -> the fields that it holds: the longest beginning of a field's place decides.
GROUPS: dict[str, tuple[str, ...]] = {
    "slides": ("data.",),
    "model": ("model.",),
    "training": ("optim.", "policies.stacking.bags_per_step"),
    "run": ("run.",),
    "validation and test": (
        *("run.eval_", "run.metric_", "run.validat", "run.early_", "run.heatmaps"),
        *("policies.norm.evaluation", "policies.norm.recalibration"),
    ),
    "tiles": ("policies.tiling.", "policies.reading.", "data.tiles_dir"),
    "augmentation": ("policies.augment.",),
    "BatchNorm": ("policies.norm.",),
    "memory": ("policies.partition.", "run.memory_format", "run.tf32"),
    "processes and GPUs": (
        *("policies.stacking.", "policies.tile_parallel.", "policies.compression."),
        *("run.fsdp", "run.deepspeed", "run.ddp_timeout"),
    ),
}


def group_of(place: str) -> str:
    """The group of a field."""
    return max(GROUPS, key=lambda name: max(len(begin) * place.startswith(begin) for begin in GROUPS[name]))


# Of fields whose default is no value that could be typed.
DEFAULT_WORDS: dict[str, str] = {
    "data.manifest": "the demo cohort's",
    "data.demo_dir": "a folder of theirs below runs/",
    "data.tiles_dir": "in the run's folder",
    "data.features_dir": "none, an encoder computes them",
    "data.classes": "the labels of the manifest, sorted",
    "data.positive_class": "the second",
    "data.slide_mpp": "none, such slides are refused",
    "data.tissue_masks": "none",
    "data.dataset_name": "the manifest's name without its suffix",
    "data.split_name": "none",
    "policies.tiling.tile_size_px": f"256, of the demo {DEMO_TILE_SIZE_PX}",
    "policies.reading.tiles_per_slide": "all",
    "policies.reading.tile_store": "none, the slides are read",
    "policies.partition.chunk_size": "the plan chooses",
    "policies.partition.gpu_budget_bytes": "nine tenths of what is free on a GPU, no limit on a CPU",
    "policies.partition.host_budget_bytes": "half of the memory that is free",
    "policies.partition.nvme_path": "none",
    "policies.partition.nvme_budget_bytes": "half of what is free there",
    "policies.stacking.bags_per_step": "--per_device_train_batch_size x --gradient_accumulation_steps x processes",
    "policies.stacking.virtual_workers": "--gradient_accumulation_steps",
    "policies.stacking.max_tiles_per_rank": "no limit",
    "model.encoder_weights": "none, RANDOM weights",
    "model.encoder_features": "as the encoder's authors do, mostly pooled",
    "model.dropout": "as in the aggregator's original",
    "model.aggregator_options": "as in the aggregator's original",
    "model.freeze_until": "none, all of it is trained",
    "optim.encoder_learning_rate": f"--learning_rate; of an encoder from weights at most {TUNED_LEARNING_RATE:g}",
    "optim.class_weights": "1 each",
    "run.output_dir": "a new one below runs/, named by the time",
    "run.validation_device": "the main process's",
    "run.eval_tiles": "all",
    "run.heatmaps": "all",
    "run.deepspeed": "none",
}


def default_of(place: str) -> Any:
    """The default of a field of the settings, "group.name" or "policies.policy.name"."""
    value: Any = TrainSettings()
    for name in place.split("."):
        value = getattr(value, name)
    return value


def default_words(place: str) -> str:
    """The default as it would be typed, or in words."""
    value = default_of(place)
    if place in DEFAULT_WORDS:
        return DEFAULT_WORDS[place]
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)
