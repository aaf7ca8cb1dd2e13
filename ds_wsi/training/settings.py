"""A run's settings, grouped by the part of the system that they concern; option names are the HF Trainer's."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ds_wsi.bags.policy import CHECKS
from ds_wsi.config import DsWsiConfig
from ds_wsi.evaluation.metrics import METRIC_NAMES
from ds_wsi.models.choices import AGGREGATORS, FEATURES
from ds_wsi.runtime.choices import LEARNING_RATE, MEMORY_FORMATS, OPTIMIZERS, PRECISIONS, TF32, WEIGHT_DECAY
from ds_wsi.runtime.setting import SWITCH, Decides, assignments, names, numbers, setting, tiles_or_all
from ds_wsi.slides.policy import DEMO_DIRS
from ds_wsi.training.choices import SCHEDULES

if TYPE_CHECKING:
    from ds_wsi.evaluation.protocol import EvaluationProtocol

ADAM_BETA = 0.9
TUNED_LEARNING_RATE = 3e-5  # at most, by default, of an encoder that starts from weights


@dataclass(frozen=True)
class DataSettings:
    """Which slides."""

    manifest: str | None = setting(
        None,
        "table of the slides: CSV, JSON, Parquet or a saved dataset; docs/tables.md has its columns",
        Decides.RESOLVED,
        resolved="slides",
        option="manifest",
        words="the demo cohort's",
        column=True,
    )
    demo: str = setting(
        "plain",
        "demo cohort to train on without --manifest: of one centre, of ten whose stains and scanners differ, or "
        "of these with tumours that are harder to see",
        Decides.RESOLVED,
        resolved="slides",
        option="demo",
        kind=tuple(DEMO_DIRS),
        column=True,
    )
    demo_dir: str | None = setting(
        None,
        "folder that keeps the demo slides",
        Decides.NOTHING,
        option="demo_dir",
        words="a folder of theirs below runs/",
    )
    tiles_dir: str | None = setting(
        None,
        "folder that keeps each slide's tile coordinates, so that another run need not look for them again",
        Decides.NOTHING,
        option="tiles_dir",
        words="in the run's folder",
        group="tiles",
    )
    classes: tuple[str, ...] | None = setting(
        None,
        "names of the classes in the order of the model's outputs, comma-separated, such as normal,tumor",
        Decides.RESOLVED,
        resolved="classes",
        option="classes",
        kind=names,
        words="the labels of the manifest, sorted",
    )
    positive_class: str | None = setting(
        None,
        "class whose F1 is told, where there are two; it becomes the second",
        Decides.RESOLVED,
        resolved="classes",
        option="positive_class",
        words="the second",
    )
    slide_mpp: float | None = setting(
        None,
        "resolution in um/px of slides whose files do not tell theirs, such as 0.25",
        Decides.RESOLVED,
        resolved="grids",
        option="slide_mpp",
        kind=float,
        words="none, such slides are refused",
    )
    tissue_masks: str | None = setting(
        None,
        "folder of masks, <slide_id>.geojson (QuPath's) or .png, that say where tissue is; slides without one go "
        "by --tissue",
        Decides.RESOLVED,
        resolved="grids",
        option="tissue_masks",
        words="none",
    )
    masks_in_bounds: bool = setting(
        False,
        "count the masks' places from the scanned area's corner, as QuPath does, and not from level 0's",
        Decides.RESOLVED,
        resolved="grids",
        option="masks_in_bounds",
    )
    skip_bad_slides: bool = setting(
        False,
        "leave out slides that cannot be used, and list them",
        Decides.RESOLVED,
        resolved="slides",
        option="skip_bad_slides",
    )
    dataset_name: str | None = setting(
        None,
        "name of the dataset in tables of runs",
        Decides.NAME,
        option="dataset_name",
        words="the manifest's name without its suffix",
        column=True,
    )
    split_seed: int = setting(
        0,
        "seed of the draw of train, validation and test, where the manifest has no splits; --seed has no part in it",
        Decides.RESOLVED,
        resolved="slides",
        option="split_seed",
        column=True,
    )
    split_name: str = setting(
        "",
        "name of the split or fold that the manifest holds, such as fold_0, in tables of runs",
        Decides.NAME,
        option="split_name",
        words="none",
        column=True,
    )
    features_dir: str | None = setting(
        None,
        "train the aggregator alone, on the features in this folder, a file a slide",
        Decides.RESOLVED,
        resolved="features",
        option="features_dir",
        words="none, an encoder computes them",
        column=True,
    )
    check_features: str = setting(
        "full",
        "whether every file of features is read whole before training (full), or its head alone (shapes)",
        Decides.NOTHING,
        option="check_features",
        kind=CHECKS,
    )

    def __post_init__(self) -> None:
        """Refuse a demo beside a cohort."""
        if self.manifest is not None and self.demo != "plain":
            raise ValueError(f"--demo must not be given with --manifest, got {self.demo}. HINT: leave out one of them.")

    @property
    def demo_folder(self) -> str:
        """Where the demo cohort is kept."""
        return self.demo_dir or DEMO_DIRS[self.demo]


@dataclass(frozen=True)
class ModelSettings:
    """Which model."""

    encoder: str = setting(
        "resnet18",
        "encoder of the tiles: a timm model's name such as resnet50, hf-hub:ORG/NAME, or local-dir:PATH",
        Decides.RESULT,
        option="encoder",
        column=True,
    )
    encoder_weights: str | None = setting(
        None,
        "file the encoder starts from: .safetensors, or a timm checkpoint",
        Decides.RESOLVED,
        resolved="encoder_weights",
        option="encoder_weights",
        words="none, RANDOM weights",
    )
    pretrained: bool = setting(
        False, "start the encoder from the weights that timm has for its name", Decides.RESULT, option="pretrained"
    )
    encoder_features: str | None = setting(
        None,
        "what leaves the encoder for each tile",
        Decides.RESOLVED,
        resolved="encoder_features",
        option="encoder_features",
        kind=FEATURES,
        words="as the encoder's authors do, mostly pooled",
    )
    aggregator: str = setting(
        "gated_abmil",
        "MIL pooling that turns a slide's features into its prediction",
        Decides.RESULT,
        option="aggregator",
        kind=tuple(AGGREGATORS),
        column=True,
    )
    dropout: float | None = setting(
        None,
        "dropout of the aggregator, 0 to 1",
        Decides.RESOLVED,
        resolved="dropout",
        option="dropout",
        kind=float,
        words="as in the aggregator's original",
    )
    aggregator_options: tuple[tuple[str, float | str], ...] = setting(
        (),
        "further options of the aggregator, name=value and comma-separated, such as landmarks=64,heads=4",
        Decides.RESOLVED,
        resolved="aggregator_options",
        option="aggregator_options",
        kind=assignments,
        words="as in the aggregator's original",
    )
    freeze_encoder: bool = setting(
        False, "train the aggregator only", Decides.RESULT, option="freeze_encoder", kind=SWITCH, column=True
    )
    freeze_until: str | None = setting(
        None,
        "first submodule of the encoder that is trained, such as layer3; those before it are frozen",
        Decides.RESULT,
        option="freeze_until",
        words="none, all of it is trained",
    )
    freeze_encoder_epochs: int = setting(
        0, "number of first epochs that train the aggregator only", Decides.RESULT, option="freeze_encoder_epochs"
    )
    lora_rank: int = setting(
        0,
        "rank of LoRA adapters that are trained in the encoder's place; 0 has none",
        Decides.RESULT,
        option="lora_rank",
    )
    lora_alpha: float = setting(
        16.0,
        "scale of the LoRA adapters, over their rank",
        Decides.RESULT,
        option="lora_alpha",
        needs=("lora_rank", ()),
    )
    lora_targets: tuple[str, ...] = setting(
        ("qkv", "proj"),
        "names of the linear layers that get LoRA adapters, comma-separated",
        Decides.RESULT,
        option="lora_targets",
        kind=names,
        needs=("lora_rank", ()),
    )

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        for name in ("freeze_encoder_epochs", "lora_rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must be at least 0, got {getattr(self, name)}")
        given = [name for name, _ in self.aggregator_options]
        if len(set(given)) < len(given):
            raise ValueError(f"--aggregator_options must name an option once, got {', '.join(given)}")
        if "dropout" in given:
            raise ValueError("--aggregator_options must not hold dropout. HINT: --dropout sets it.")
        from ds_wsi.models.aggregators import check_aggregator  # here, for help pages need no torch

        check_aggregator(self.aggregator, dict(self.aggregator_options))  # not after hours of tiling
        if not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"--lora_alpha must be positive, got {self.lora_alpha}")
        if self.lora_rank and not self.lora_targets:
            raise ValueError("--lora_targets must name a layer, got none. HINT: --lora_targets qkv,proj.")
        parts = {
            "--freeze_encoder": self.freeze_encoder,
            "--freeze_until": self.freeze_until is not None,
            "--lora_rank": self.lora_rank > 0,
        }
        given = [name for name, is_given in parts.items() if is_given]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} must not be given together. HINT: choose one.")
        if self.freeze_encoder and self.freeze_encoder_epochs:
            raise ValueError("--freeze_encoder must not be given with --freeze_encoder_epochs. HINT: choose one.")
        if self.pretrained and self.encoder_weights is not None:
            raise ValueError("--pretrained and --encoder_weights must not be given together. HINT: choose one.")

    @property
    def has_weights(self) -> bool:
        """Whether the encoder starts from weights: of a file, of timm's, or of the place that its name says."""
        return self.encoder_weights is not None or self.pretrained or ":" in self.encoder


@dataclass(frozen=True)
class OptimSettings:
    """How it is optimised."""

    num_train_epochs: int = setting(
        8, "number of passes over the training slides", Decides.RESULT, option="num_train_epochs"
    )
    per_device_train_batch_size: int = setting(
        1,
        "number of slides that a process computes in a micro-step",
        Decides.STEP,
        option="per_device_train_batch_size",
    )
    gradient_accumulation_steps: int = setting(
        1, "number of micro-steps of an optimizer step", Decides.STEP, option="gradient_accumulation_steps"
    )
    learning_rate: float = setting(
        LEARNING_RATE, "peak of the learning rate, reached after --warmup_steps", Decides.RESULT, option="learning_rate"
    )
    encoder_learning_rate: float | None = setting(
        None,
        "peak of the encoder's learning rate",
        Decides.RESOLVED,
        resolved="encoder_learning_rate",
        option="encoder_learning_rate",
        kind=float,
        words=f"--learning_rate; of an encoder from weights at most {TUNED_LEARNING_RATE:g}",
    )
    weight_decay: float = setting(WEIGHT_DECAY, "weight decay of the optimizer", Decides.RESULT, option="weight_decay")
    optim: str = setting(
        "adamw",
        "optimizer; the DeepSpeed JSON's section `optimizer` decides where it has one",
        Decides.RESULT,
        option="optim",
        kind=tuple(OPTIMIZERS),
    )
    momentum: float = setting(0.0, "momentum of --optim sgd, 0 to 1", Decides.RESULT, option="momentum")
    lr_scheduler_type: str = setting(
        "cosine",
        "how the learning rate falls after the warm-up",
        Decides.RESULT,
        option="lr_scheduler_type",
        kind=SCHEDULES,
    )
    warmup_steps: int = setting(
        10,
        "number of optimizer steps in which the learning rate rises to its peak",
        Decides.RESULT,
        option="warmup_steps",
    )
    max_grad_norm: float = setting(
        0.0,
        "largest norm of the gradient, to which a larger one is scaled down; 0 clips nothing",
        Decides.RESULT,
        option="max_grad_norm",
    )
    class_weights: tuple[float, ...] | None = setting(
        None,
        "factor of a slide's loss for each class, comma-separated in the classes' order, such as 1,2.5",
        Decides.RESULT,
        option="class_weights",
        kind=numbers,
        words="1 each",
    )
    bf16: bool = setting(False, "train in bfloat16 mixed precision", Decides.RESULT, option="bf16", kind=SWITCH)
    fp16: bool = setting(False, "train in float16 mixed precision", Decides.RESULT, option="fp16", kind=SWITCH)
    demon: float = setting(
        0.0,
        f"let Adam's momentum decay (DEMON): its first beta goes from BETA, {ADAM_BETA} without a value, to 0 over the "
        "run",
        Decides.RESULT,
        option="demon",
        bare=ADAM_BETA,
        metavar="BETA",
        words="off",
    )
    ema_decay: float = setting(
        0.0,
        "decay, 0 to 1, of a moving average of the weights, which is then validated and exported; 0 has none",
        Decides.RESULT,
        option="ema_decay",
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        for name in ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("weight_decay", "max_grad_norm", "warmup_steps"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"--{name} must be at least 0, got {getattr(self, name)}")
        for name in ("demon", "ema_decay", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} must be in [0, 1), got {getattr(self, name)}. HINT: 0 turns it off.")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"--learning_rate must be positive, got {self.learning_rate}")
        if self.encoder_learning_rate is not None and not 0 < self.encoder_learning_rate < float("inf"):
            raise ValueError(f"--encoder_learning_rate must be positive, got {self.encoder_learning_rate}")
        if self.class_weights is not None and not all(0 < weight < float("inf") for weight in self.class_weights):
            raise ValueError(f"--class_weights must be positive, got {self.class_weights}")
        if self.momentum and self.optim != "sgd":
            raise ValueError(
                f"--momentum must be given with --optim sgd, got {self.momentum} and {self.optim}. HINT: --optim sgd; "
                "Adam's betas are optimizer.params.betas of the DeepSpeed JSON."
            )
        if self.bf16 and self.fp16:
            raise ValueError("--bf16 and --fp16 must not be given together. HINT: choose one.")

    def encoder_factor(self, *, from_weights: bool) -> float:
        """The encoder's learning rate over `learning_rate`."""
        wanted = self.encoder_learning_rate
        if wanted is None:
            wanted = min(self.learning_rate, TUNED_LEARNING_RATE) if from_weights else self.learning_rate
        return wanted / self.learning_rate

    @property
    def mixed_precision(self) -> str:
        """Accelerate's name of the precision."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "no"


@dataclass(frozen=True)
class RunSettings:
    """Where and how it runs."""

    output_dir: str | None = setting(
        None,
        "folder of the run: new, empty, or the run's own with --resume_from_checkpoint",
        Decides.NOTHING,
        option="output_dir",
        words="a new one below runs/, named by the time",
    )
    seed: int = setting(
        0,
        "seed of the weights, the order of the slides and every draw but that of the splits",
        Decides.RESULT,
        option="seed",
        column=True,
    )
    resume_from_checkpoint: str | None = setting(
        None,
        "go on with a run: a checkpoint's folder, or without a path the newest whole one of --output_dir",
        Decides.NOTHING,
        option="resume_from_checkpoint",
        kind=str,
        bare="latest",
        metavar="PATH",
        words="a new run",
    )
    save_steps: int = setting(
        0,
        "number of optimizer steps between checkpoints within an epoch; 0 leaves them to --save_minutes",
        Decides.NOTHING,
        option="save_steps",
    )
    save_minutes: float = setting(
        15.0,
        "minutes after which a checkpoint is written within an epoch too; 0 saves at the ends of epochs only",
        Decides.NOTHING,
        option="save_minutes",
    )
    max_minutes: float = setting(
        0.0,
        "minutes after which the run stops with a checkpoint and exit status 75; the same command goes on; 0: never",
        Decides.NOTHING,
        option="max_minutes",
    )
    save_total_limit: int = setting(
        2, "number of checkpoints that are kept, the newest", Decides.NOTHING, option="save_total_limit"
    )
    save_beside: bool = setting(
        True,
        "write checkpoints while the training goes on, from a copy in host memory",
        Decides.NOTHING,
        option="save_beside",
        kind=SWITCH,
    )
    metric_for_best_model: str = setting(
        "auc",
        "validation metric whose best epoch is exported",
        Decides.RESULT,
        option="metric_for_best_model",
        kind=METRIC_NAMES,
        group="validation and test",
    )
    validate_beside: bool = setting(
        False,
        "validate each epoch in a process of its own while the next one trains",
        Decides.RESOLVED,
        resolved="early_stopping",
        option="validate_beside",
        group="validation and test",
    )
    validation_device: str | None = setting(
        None,
        "device of --validate_beside, such as cuda:1",
        Decides.NOTHING,
        option="validation_device",
        words="the main process's",
        group="validation and test",
    )
    early_stopping_patience: int = setting(
        0,
        "number of epochs without a better --metric_for_best_model that end the run; 0 goes on",
        Decides.RESULT,
        option="early_stopping_patience",
        group="validation and test",
    )
    deepspeed: str | None = setting(
        None,
        'DeepSpeed JSON, whose section "ds_wsi" sets the policies; options override it',
        Decides.RESOLVED,
        resolved="optimizer",
        option="deepspeed",
        words="none",
        group="processes and GPUs",
    )
    fsdp: bool = setting(
        False,
        "shard the model over the processes with FSDP2",
        Decides.NOTHING,
        option="fsdp",
        group="processes and GPUs",
    )
    ddp_timeout: int = setting(
        1800,
        "seconds that a process waits for the others before it gives up",
        Decides.NOTHING,
        option="ddp_timeout",
        group="processes and GPUs",
    )
    eval_tiles: int | None = setting(
        None,
        "number of random tiles of each test slide, such as 256, or all",
        Decides.TEST,
        option="eval_tiles",
        kind=tiles_or_all,
        words="all",
        group="validation and test",
        column=True,
    )
    eval_runs: int = setting(
        1,
        "number of draws of --eval_tiles, over which the test metrics are averaged",
        Decides.TEST,
        option="eval_runs",
        group="validation and test",
        column=True,
    )
    eval_seed: int = setting(
        0,
        "seed of the draws of --eval_tiles",
        Decides.TEST,
        option="eval_seed",
        group="validation and test",
        column=True,
    )
    eval_precision: str = setting(
        "no",
        "precision in which the encoder computes validation and test; no is float32",
        Decides.RESULT,
        option="eval_precision",
        kind=PRECISIONS,
        group="validation and test",
    )
    tf32: str = setting(
        "torch",
        "whether a GPU rounds factors of float32 products to TF32; torch leaves torch's setting",
        Decides.RESULT,
        option="tf32",
        kind=TF32,
        group="memory",
    )
    memory_format: str = setting(
        "auto",
        "memory layout of the encoder's convolutions; auto takes the faster one by a trial on a GPU",
        Decides.NOTHING,
        option="memory_format",
        kind=MEMORY_FORMATS,
        group="memory",
    )
    heatmaps: int | None = setting(
        None,
        "number of test slides that get a heat map, the first ones; 0 draws none",
        Decides.NOTHING,
        option="heatmaps",
        kind=int,
        words="all",
        group="validation and test",
    )
    disable_tqdm: bool = setting(
        False, "show neither bars nor lines of progress", Decides.NOTHING, option="disable_tqdm"
    )

    def __post_init__(self) -> None:
        """Refuse a limit under which a torn checkpoint would lose the run, and a protocol that tests nothing."""
        _ = self.evaluation
        if self.save_total_limit < 2:
            raise ValueError(
                f"--save_total_limit must be at least 2, got {self.save_total_limit}. "
                "HINT: a torn checkpoint is passed over for the one before it."
            )
        if self.save_steps < 0:
            raise ValueError(f"--save_steps must be at least 0, got {self.save_steps}")
        if not 0 <= self.save_minutes < float("inf"):
            raise ValueError(f"--save_minutes must be at least 0, got {self.save_minutes}. HINT: 0 turns it off.")
        if not 0 <= self.max_minutes < float("inf"):
            raise ValueError(f"--max_minutes must be at least 0, got {self.max_minutes}. HINT: 0 goes on to the end.")
        if self.early_stopping_patience < 0:
            raise ValueError(
                f"--early_stopping_patience must be at least 0, got {self.early_stopping_patience}. "
                "HINT: 0 turns it off."
            )
        if self.validation_device and not self.validate_beside:
            raise ValueError(
                f"--validation_device must be given with --validate_beside, got {self.validation_device} alone"
            )
        if self.fsdp and self.deepspeed:
            raise ValueError(
                f"--fsdp must not be given with --deepspeed, got {self.deepspeed}. HINT: choose one; ZeRO-3 shards too."
            )
        if self.heatmaps is not None and self.heatmaps < 0:
            raise ValueError(f"--heatmaps must be at least 0, got {self.heatmaps}. HINT: 0 draws none.")
        if self.ddp_timeout < 1:
            raise ValueError(f"--ddp_timeout must be at least 1 second, got {self.ddp_timeout}")

    @property
    def evaluation(self) -> "EvaluationProtocol":
        """On which tiles of the test slides the model is tested."""
        from ds_wsi.evaluation.protocol import EvaluationProtocol  # here, for help pages need no torch

        return EvaluationProtocol(self.eval_tiles, self.eval_runs, self.eval_seed)


@dataclass(frozen=True)
class TrainSettings:
    """Everything a run is given; `policies` is the "ds_wsi" section of the DeepSpeed JSON."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    run: RunSettings = field(default_factory=RunSettings)
    policies: DsWsiConfig = field(default_factory=DsWsiConfig)

    @property
    def micro_steps(self) -> int:
        """Into how many stacks a process divides its share of an optimizer step."""
        return self.policies.stacking.virtual_workers or self.optim.gradient_accumulation_steps

    @property
    def encoder_factor(self) -> float:
        """The encoder's learning rate over the aggregator's; 1 where the encoder rests for good, or adapters learn."""
        if self.model.freeze_encoder or self.model.lora_rank:
            return 1.0
        return self.optim.encoder_factor(from_weights=self.model.has_weights)
