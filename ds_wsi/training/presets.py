"""The papers' hyper-parameters as plain data: each preset says what it sets and where that stands.

`settings` are the fields that the train options set ("optim.learning_rate"), `protocol` the options of the launchers
(how the dataset is read and split, how many models are trained). "(ours)" marks what no source gives.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

BIG_LAYERS = "Big-Layers, sections 4.2 to 4.2.6"
CAMPANELLA = "Campanella et al., Beyond Multiple Instance Learning, Figures 4 and 5"
EAGLE = "the EAGLE repository's training of its EGFR model"


@dataclass(frozen=True)
class Preset:
    """One experiment.

    Args:
        dataset: the one whose launcher takes it.
        source: paper and section.
        settings: field of the settings -> value.
        protocol: option of the launcher -> value.
        evaluation: the paper's protocol of evaluation, in words.
        pretrained: what the paper's encoder starts from; empty where it starts from nothing.
    """

    dataset: str
    source: str
    settings: Mapping[str, Any]
    protocol: Mapping[str, Any] = field(default_factory=dict)
    evaluation: str = ""
    pretrained: str = ""


def one_rate(rate: float) -> dict[str, float]:
    """The learning rate of the encoder and of the aggregator, which the papers train with one."""
    return {"optim.learning_rate": rate, "optim.encoder_learning_rate": rate}


# Grey values in [3, 230] in at least 60% of a tile, nothing else (4.2).
GREY = {"policies.tiling.grey_range": (3, 230), "policies.tiling.tissue": "grey"}
# Tissue by Otsu's threshold (4.2), here on saturation, and in at least 60% of a tile (ours).
OTSU = {"policies.tiling.grey_range": (0, 255), "policies.tiling.tissue": "otsu"}
TILES = {  # 4.2: non-overlapping, 256 px; 20x
    "policies.tiling.tile_size_px": 256,
    "policies.tiling.mpp": 0.5,
    "policies.tiling.min_tissue_fraction": 0.6,
}
RESNET18 = {
    "model.encoder": "resnet18",
    "model.aggregator": "abmil",  # the papers' first; --aggregator dtfd and transmil are their others
    "policies.partition.mode": "auto",
}
# As the authors' published code has it, a clean-up of their research code (github.com/undercutspiky/big-layers, commit
# f1372709, training/mil_wrapper.py and train.py): the two slides of a micro-batch go through the encoder in one call,
# whose batch statistics train-mode BatchNorm takes; they are evaluated with the running statistics.
THEIR_NORMS = {"policies.norm.training": "stack", "policies.norm.evaluation": "running"}
ADAM = {
    "optim.optim": "adam",
    "optim.weight_decay": 1e-4,
    "optim.lr_scheduler_type": "cosine",
    "optim.warmup_steps": 0,
}
# Blur, colour jitter, flips and rotation (4.2.6); their strengths are ours.
AUGMENTED = {
    "policies.augment.flips": True,
    "policies.augment.colour": 0.1,
    "policies.augment.rotation": 180.0,
    "policies.augment.blur": 1.0,
}
PLAIN = {"policies.augment.flips": False, "policies.augment.colour": 0.0}

PANDA = {**TILES, **GREY, **RESNET18, **THEIR_NORMS, **ADAM, **PLAIN} | {
    "model.encoder_features": "flattened",  # 4.2.3: the final stage's output, a map of 8 x 8 x 512
    "policies.reading.tiles_per_slide": 256,
    "run.metric_for_best_model": "quadratic_weighted_kappa",
}
PANDA_COSINE = {
    "optim.num_train_epochs": 20,
    **one_rate(1e-4),  # chosen among 1e-4, 5e-5 and 1e-5 by validation
    "optim.per_device_train_batch_size": 2,
    "optim.gradient_accumulation_steps": 16,
    "policies.stacking.bags_per_step": 32,  # 2 x 16, on any number of processes
}
PANDA_EXPONENTIAL = {
    "optim.num_train_epochs": 45,
    **one_rate(5e-5),  # (ours) among the paper's three
    "optim.lr_scheduler_type": "exponential",  # rate 0.955 an epoch
    "optim.per_device_train_batch_size": 2,
    "optim.gradient_accumulation_steps": 1,
    "policies.stacking.bags_per_step": 2,
}
PANDA_PROTOCOL = {
    "monte_carlo_runs": 1,  # 80:10:10 by label, as Song et al.'s; theirs itself with --split_file
    "seeds": 3,
}
PANDA_EVALUATION = (
    "running statistics of BatchNorm; all tiles of the test split; "
    "TCGA-PRAD on all tiles, and the mean of 100 runs on 256 random ones "
    "(launch/evaluate.py --dataset tcga --eval_tiles 256 --eval_runs 100)"
)

CAMELYON = {**TILES, **OTSU, **RESNET18, **THEIR_NORMS, **ADAM, **AUGMENTED} | {
    "model.encoder_features": "flattened",  # the final stage's output, of all their models (4.2.3)
    "run.metric_for_best_model": "accuracy",
}
CAMELYON_FROZEN = {
    "model.freeze_encoder": True,
    "optim.num_train_epochs": 120,
    **one_rate(1e-4),
    "optim.per_device_train_batch_size": 2,
    "optim.gradient_accumulation_steps": 2,
    "policies.stacking.bags_per_step": 4,  # 2 x 2, on any number of processes
    "policies.reading.tiles_per_slide": 1024,
}
CAMELYON_END_TO_END = {
    "optim.num_train_epochs": 90,
    **one_rate(5e-5),
    "optim.demon": 0.9,  # Adam's first beta, where DEMON starts (ours: its default)
    "optim.per_device_train_batch_size": 2,
    "optim.gradient_accumulation_steps": 2,
    "policies.stacking.bags_per_step": 4,
    "policies.reading.tiles_per_slide": 512,
}
CAMELYON_PROTOCOL = {
    "target": "tumor",  # binary labels, after Ling et al.: --corrections
    "validation_fraction": 0.1,  # 50 slides in the paper; by patient (ours), as the slides of a patient look alike
    "seeds": 3,
}
CAMELYON_EVALUATION = (
    "running statistics of BatchNorm; ABMIL and frozen encoders: all tiles; "
    "DTFD and TransMIL end to end: the mean of 3 runs on 2,048 random tiles "
    "(--eval_tiles 2048 --eval_runs 3)"
)
LUNG = {**TILES, **GREY, **RESNET18, **ADAM, **AUGMENTED} | {  # (ours) throughout: DPGS trains on stored features
    "optim.num_train_epochs": 30,
    **one_rate(5e-5),
    "optim.per_device_train_batch_size": 2,
    "optim.gradient_accumulation_steps": 4,
    "policies.stacking.bags_per_step": 8,
    "policies.reading.tiles_per_slide": 512,
    "run.metric_for_best_model": "auc",
}
CUSTOM = {**LUNG, "optim.num_train_epochs": 20}  # (ours) throughout
FIVE_FOLDS = {"folds": 5, "validation_fraction": 0.1, "seeds": 1}  # (ours)
IMAGENET = "ImageNet weights"

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "panda_cosine": Preset(
            "panda", BIG_LAYERS, {**PANDA, **PANDA_COSINE}, PANDA_PROTOCOL, PANDA_EVALUATION, IMAGENET
        ),
        "panda_exponential": Preset(
            "panda", BIG_LAYERS, {**PANDA, **PANDA_EXPONENTIAL}, PANDA_PROTOCOL, PANDA_EVALUATION, IMAGENET
        ),
        "panda_augmented": Preset(
            "panda", BIG_LAYERS, {**PANDA, **PANDA_COSINE, **AUGMENTED}, PANDA_PROTOCOL, PANDA_EVALUATION, IMAGENET
        ),
        "panda_frozen": Preset(
            "panda",
            BIG_LAYERS,
            {**PANDA, **PANDA_COSINE, "model.freeze_encoder": True},
            PANDA_PROTOCOL,
            PANDA_EVALUATION,
            IMAGENET,
        ),
        "camelyon17": Preset(
            "camelyon17",
            BIG_LAYERS,
            {**CAMELYON, **CAMELYON_END_TO_END},
            CAMELYON_PROTOCOL,
            f"the official test patients, CAMELYON16 as an external set; {CAMELYON_EVALUATION}",
            IMAGENET,
        ),
        "camelyon17_frozen": Preset(
            "camelyon17",
            BIG_LAYERS,
            {**CAMELYON, **CAMELYON_FROZEN},
            CAMELYON_PROTOCOL,
            f"the official test patients, CAMELYON16 as an external set; {CAMELYON_EVALUATION}",
            IMAGENET,
        ),
        # (ours) the papers train on CAMELYON17 and test on CAMELYON16; its own training takes the same values.
        "camelyon16": Preset(
            "camelyon16",
            f"(ours) with CAMELYON17's values of {BIG_LAYERS}",
            {**CAMELYON, **CAMELYON_END_TO_END},
            CAMELYON_PROTOCOL,
            f"the official test slides; {CAMELYON_EVALUATION}",
            IMAGENET,
        ),
        "camelyon16_frozen": Preset(
            "camelyon16",
            f"(ours) with CAMELYON17's values of {BIG_LAYERS}",
            {**CAMELYON, **CAMELYON_FROZEN},
            CAMELYON_PROTOCOL,
            f"the official test slides; {CAMELYON_EVALUATION}",
            IMAGENET,
        ),
        "tcga_lung": Preset("tcga", "(ours)", LUNG, FIVE_FOLDS, "all tiles of each fold's test split", IMAGENET),
        "tcga_lung_frozen": Preset(
            "tcga",
            "(ours)",
            {**LUNG, "model.freeze_encoder": True},
            FIVE_FOLDS,
            "all tiles of each fold's test split",
            IMAGENET,
        ),
        "egfr": Preset(
            "custom",
            f"{CAMPANELLA}; {EAGLE}",
            {**CUSTOM}
            | {
                "model.aggregator": "gated_abmil",
                "optim.optim": "adamw",
                **one_rate(1e-6),  # of a pathology foundation model: give it with --encoder
                "optim.fp16": True,
                "optim.num_train_epochs": 22,  # the first 2 of the aggregator alone
                "model.freeze_encoder_epochs": 2,
                "policies.reading.tiles_per_slide": 2208,  # 23 GPUs x 96 tiles of one slide
                "policies.stacking.bags_per_step": 1,
                "optim.per_device_train_batch_size": 1,
                "optim.gradient_accumulation_steps": 1,
            },
            {"monte_carlo_runs": 20, "seeds": 1},
            "validation AUC of 20 Monte-Carlo runs",
            "a pathology foundation model's weights",
        ),
        "breast": Preset(
            "custom",
            CAMPANELLA,
            {**CUSTOM}  # (ours): the paper tells the task and its metric
            | {
                "model.aggregator": "gated_abmil",
                "policies.reading.tiles_per_slide": 2208,
                "policies.stacking.bags_per_step": 1,
                "optim.per_device_train_batch_size": 1,
                "optim.gradient_accumulation_steps": 1,
            },
            {"monte_carlo_runs": 1, "seeds": 1},
            "validation AUC with bootstrap intervals",
            IMAGENET,
        ),
        "custom": Preset("custom", "(ours)", CUSTOM, {"monte_carlo_runs": 1, "seeds": 1}, "all tiles", IMAGENET),
    }
)
DEFAULTS = {
    "panda": "panda_cosine",
    "camelyon16": "camelyon16",
    "camelyon17": "camelyon17",
    "tcga": "tcga_lung",
    "custom": "custom",
}


def presets_of(dataset: str) -> dict[str, Preset]:
    """The presets that a dataset's launcher takes, by name, its default first."""
    by_name = {name: preset for name, preset in PRESETS.items() if preset.dataset == dataset}
    return {DEFAULTS[dataset]: by_name.pop(DEFAULTS[dataset]), **by_name}


def describe(presets: Mapping[str, Preset]) -> str:
    """The presets with their values and sources, as text."""
    lines = []
    for name, preset in presets.items():
        lines += [f"{name}", f"  source: {preset.source}"]
        if preset.evaluation:
            lines.append(f"  evaluation in the paper: {preset.evaluation}")
        if preset.pretrained:
            lines.append(f"  the encoder starts from: {preset.pretrained} (--encoder_weights)")
        lines += [f"  --{option} {value}" for option, value in preset.protocol.items()]
        lines += [f"  {field_path} = {value}" for field_path, value in preset.settings.items()]
    return "\n".join(lines)
