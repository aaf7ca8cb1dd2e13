"""How a run optimises."""

from dataclasses import dataclass

from ds_wsi.runtime.bounds import LARGEST_FACTOR, MOST_MICRO_STEPS, require_at_most
from ds_wsi.runtime.choices import LEARNING_RATE, OPTIMIZERS, WEIGHT_DECAY
from ds_wsi.runtime.setting import SWITCH, Decides, numbers, setting
from ds_wsi.training.settings.demo import EPOCHS

ADAM_BETA = 0.9
SCHEDULES = ("cosine", "linear", "constant", "exponential")
TUNED_LEARNING_RATE = 3e-5  # at most, by default, of an encoder that starts from weights


@dataclass(frozen=True)
class OptimSettings:
    """How it is optimised."""

    recipe: str | None = setting(
        None,
        "settings that go together, below those that are given: finetune, of a foundation model",
        Decides.NOTHING,
        option="recipe",
        kind=("finetune",),
        words="none",
    )
    num_train_epochs: int = setting(
        8,
        "number of passes over the training slides",
        Decides.RESULT,
        option="num_train_epochs",
        words=f"8, of the demo plain with its own encoder {EPOCHS}",
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
    layer_decay: float = setting(
        1.0,
        "factor, up to 1, of the encoder's learning rate from each layer to the one before it, such as 0.75",
        Decides.RESULT,
        option="layer_decay",
        words="1, one rate",
    )
    weight_decay: float = setting(WEIGHT_DECAY, "weight decay of the optimizer", Decides.RESULT, option="weight_decay")
    no_decay_1d: bool = setting(
        False,
        "no weight decay for biases, scales of norms, tokens and position embeddings",
        Decides.RESULT,
        option="no_decay_1d",
    )
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
    warmup_ratio: float = setting(
        0.0,
        "share of the run's optimizer steps, 0 to 1, in which the learning rate rises, in the place of --warmup_steps",
        Decides.RESULT,
        option="warmup_ratio",
        words="0: --warmup_steps",
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

    l2_sp: float = setting(
        0.0,
        "strength, times the learning rate, by which each step draws the encoder to its starting weights, such as 0.01",
        Decides.RESULT,
        option="l2_sp",
        words="0, not at all",
    )
    distill: str | None = setting(
        None,
        "folder of the starting encoder's features of the same tiles (`ds-wsi features`), near which it is held (LwF)",
        Decides.RESOLVED,
        resolved="teacher",
        option="distill",
        metavar="DIR",
        words="none",
    )
    distill_weight: float = setting(
        1.0,
        "factor of the distillation's loss beside a slide's own",
        Decides.RESULT,
        option="distill_weight",
        needs=("distill", ()),
    )
    distill_loss: str = setting(
        "mse",
        "distance of features from the teacher's: mean over dimensions of squares, or one less the cosine",
        Decides.RESULT,
        option="distill_loss",
        kind=("mse", "cosine"),
        needs=("distill", ()),
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        for name in ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        require_at_most("--gradient_accumulation_steps", self.gradient_accumulation_steps, MOST_MICRO_STEPS)
        for name in ("weight_decay", "max_grad_norm", "warmup_steps", "l2_sp"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"--{name} must be at least 0, got {getattr(self, name)}")
        for name in ("demon", "ema_decay", "momentum", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} must be in [0, 1), got {getattr(self, name)}. HINT: 0 turns it off.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer_decay must be in (0, 1], got {self.layer_decay}. HINT: 1 turns it off.")
        if not 0 < self.distill_weight < float("inf"):
            raise ValueError(f"--distill_weight must be positive, got {self.distill_weight}. HINT: 1, or 10.")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"--learning_rate must be positive, got {self.learning_rate}")
        if self.encoder_learning_rate is not None and not 0 < self.encoder_learning_rate < float("inf"):
            raise ValueError(f"--encoder_learning_rate must be positive, got {self.encoder_learning_rate}")
        for name in ("learning_rate", "encoder_learning_rate", "weight_decay", "max_grad_norm", "l2_sp"):
            require_at_most(f"--{name}", getattr(self, name) or 0, LARGEST_FACTOR)
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
        rate = self.encoder_learning_rate
        if rate is None:
            rate = min(self.learning_rate, TUNED_LEARNING_RATE) if from_weights else self.learning_rate
        return rate / self.learning_rate

    def warmup_of(self, total_steps: int) -> int:
        """Optimizer steps in which the rate rises, of so many."""
        return round(self.warmup_ratio * total_steps) if self.warmup_ratio else self.warmup_steps

    @property
    def mixed_precision(self) -> str:
        """Accelerate's name of the precision."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "no"
