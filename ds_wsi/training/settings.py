"""A run's settings, grouped by the part of the system that they concern; option names are the HF Trainer's."""

from dataclasses import dataclass, field

from ds_wsi.config import DsWsiConfig
from ds_wsi.engines.deepspeed_json.auto import LEARNING_RATE, WEIGHT_DECAY
from ds_wsi.evaluation.protocol import EvaluationProtocol
from ds_wsi.models.aggregators import check_aggregator
from ds_wsi.slides.demo import DEMO_DIRS


@dataclass(frozen=True)
class DataSettings:
    """Which slides.

    Args:
        manifest: the cohort; None trains on a demo cohort.
        demo: which, a key of `DEMOS`.
        demo_dir: where it is kept; None: in a folder of its own below runs/.
        tiles_dir: where tile grids, and what was found in files of features, are kept; by default in the run's folder.
        classes: class names in the order of the logits.
        positive_class: of two, the one of which f1 is told: it becomes the second.
        slide_mpp: um/px of slides that do not tell theirs.
        tissue_masks: folder of masks that say where tissue is, named after the slides.
        masks_in_bounds: their places count from the scanned area's corner, as QuPath's do.
        skip_bad_slides: leave out slides that cannot be used, where they would be refused.
        dataset_name: in tables of runs; by default the manifest's name without its suffix.
        split_seed: of the draw of splits, where the manifest has none; `run.seed` has no part in it.
        split_name: which of the dataset's splits or folds the manifest holds, in tables of runs.
        features_dir: train the aggregator alone, on the files of features there; None trains on slides.
        check_features: before training, read every file of features ("full") or its head alone ("shapes").
    """

    manifest: str | None = None
    demo: str = "plain"
    demo_dir: str | None = None
    tiles_dir: str | None = None
    classes: tuple[str, ...] | None = None
    positive_class: str | None = None
    slide_mpp: float | None = None
    tissue_masks: str | None = None
    masks_in_bounds: bool = False
    skip_bad_slides: bool = False
    dataset_name: str | None = None
    split_seed: int = 0
    split_name: str = ""
    features_dir: str | None = None
    check_features: str = "full"

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
    """Which model.

    Args:
        encoder: a timm model's name, `hf-hub:ORG/NAME` or `local-dir:PATH`; the latter two come with weights.
        encoder_weights: a local file, or None for random weights.
        pretrained: take the weights that timm has for the name.
        encoder_features: what leaves the encoder, one of `FEATURES`; None for what its authors take, mostly pooled.
        aggregator: a key of `AGGREGATORS`.
        dropout: of the aggregator; None for its original's.
        aggregator_options: others of the aggregator, pairs of name and value; for the rest its original's.
        freeze_encoder: train the aggregator only.
        freeze_until: the first submodule of the encoder that is trained; None trains all.
        freeze_encoder_epochs: epochs at the beginning in which only the aggregator is trained.
        lora_rank: of adapters in the encoder, which are trained in its place; 0 has none.
        lora_alpha, lora_targets: their scale, and the linear layers that have them.
    """

    encoder: str = "resnet18"
    encoder_weights: str | None = None
    pretrained: bool = False
    encoder_features: str | None = None
    aggregator: str = "gated_abmil"
    dropout: float | None = None
    aggregator_options: tuple[tuple[str, float | str], ...] = ()
    freeze_encoder: bool = False
    freeze_until: str | None = None
    freeze_encoder_epochs: int = 0
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ("qkv", "proj")

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


TUNED_LEARNING_RATE = 3e-5  # at most, by default, of an encoder that starts from weights


@dataclass(frozen=True)
class OptimSettings:
    """How it is optimised.

    Args:
        num_train_epochs: passes over the training slides.
        per_device_train_batch_size: slides a process (a group of them under tile parallelism) and micro-step.
        gradient_accumulation_steps: micro-steps an optimizer step.
        learning_rate, weight_decay: of the optimizer.
        encoder_learning_rate: the peak of the encoder's; None: `learning_rate` for one that is new, and at most
            `TUNED_LEARNING_RATE` for one that starts from weights, which one slide a step would else undo.
        optim: adam, adamw or sgd.
        momentum: of sgd.
        lr_scheduler_type: cosine, linear, constant or exponential, after `warmup_steps` of linear warm-up.
        max_grad_norm: 0 clips nothing.
        class_weights: factor of a slide's training loss by class, in the order of the classes; the step's mean is still
            over its slides. Validation losses are plain. None: 1 each.
        bf16, fp16: mixed precision.
        demon: Adam's first beta at the start, from which DEMON takes it to 0 at the end; 0 leaves the betas alone.
        ema_decay: of the moving average of the weights, which is validated and exported in their place; 0 has none.
    """

    num_train_epochs: int = 8
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    learning_rate: float = LEARNING_RATE
    encoder_learning_rate: float | None = None
    weight_decay: float = WEIGHT_DECAY
    optim: str = "adamw"
    momentum: float = 0.0
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = 10
    max_grad_norm: float = 0.0
    class_weights: tuple[float, ...] | None = None
    bf16: bool = False
    fp16: bool = False
    demon: float = 0.0
    ema_decay: float = 0.0

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
    """Where and how it runs.

    Args:
        output_dir: the run's folder; by default a new one below runs/, named by the time.
        seed: of everything random.
        resume_from_checkpoint: a checkpoint's folder, "latest" of output_dir, or None.
        save_steps: optimizer steps between checkpoints within an epoch; 0 leaves them to `save_minutes`.
        save_minutes: minutes after which a checkpoint is written within an epoch; 0 saves at the ends of epochs only.
        max_minutes: minutes after whose last step the run stops, with a checkpoint; 0 goes on to the end.
        save_total_limit: checkpoints kept, at least 2, for a torn one is passed over for the one before it.
        save_beside: write a checkpoint while the training goes on from a copy of it in host memory; at most two are on
            the way. Else the training waits until it is written.
        metric_for_best_model: validation metric by which the exported epoch is chosen; eval_loss breaks ties.
        validate_beside: validate each epoch in a process of its own while the next one trains.
        validation_device: of that process, as torch names it; by default the main process's.
        early_stopping_patience: epochs without a new highest metric_for_best_model that end the run; 0 goes on.
        deepspeed: a DeepSpeed JSON.
        fsdp: shard the model over the ranks with FSDP2, as under `accelerate launch --use_fsdp --fsdp_version 2`.
        ddp_timeout: seconds that a collective waits for the other ranks.
        eval_tiles: random tiles of each test slide, drawn in each of `eval_runs` runs; None tests on all, once.
        eval_runs: draws, over which the metrics are averaged.
        eval_seed: of the draws; not `seed`, for models that are compared are to be tested on the same tiles.
        eval_precision: in which the encoder computes in validation and test, of `PRECISIONS`.
        tf32: whether a GPU rounds factors of float32 products to TF32, of `engines.kernels.TF32`.
        memory_format: of the encoder's convolutions, of `engines.kernels.MEMORY_FORMATS`.
        heatmaps: how many test slides get a heat map; None draws all.
        disable_tqdm: neither bars nor lines of progress.
    """

    output_dir: str | None = None
    seed: int = 0
    resume_from_checkpoint: str | None = None
    save_steps: int = 0
    save_minutes: float = 15.0
    max_minutes: float = 0.0
    save_total_limit: int = 2
    save_beside: bool = True
    metric_for_best_model: str = "auc"
    validate_beside: bool = False
    validation_device: str | None = None
    early_stopping_patience: int = 0
    deepspeed: str | None = None
    fsdp: bool = False
    ddp_timeout: int = 1800
    eval_tiles: int | None = None
    eval_runs: int = 1
    eval_seed: int = 0
    eval_precision: str = "no"
    tf32: str = "torch"
    memory_format: str = "auto"
    heatmaps: int | None = None
    disable_tqdm: bool = False

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
    def evaluation(self) -> EvaluationProtocol:
        """On which tiles of the test slides the model is tested."""
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
