"""The model that a run trains."""

from dataclasses import dataclass

from ds_wsi.models.choices import AGGREGATORS, FEATURES, AggregatorNames
from ds_wsi.runtime.setting import SWITCH, Decides, assignments, names, setting
from ds_wsi.training.settings.demo import ENCODER


@dataclass(frozen=True)
class ModelSettings:
    """The model."""

    encoder: str = setting(
        "resnet18",
        "encoder of the tiles: a timm model's name such as resnet50, hf-hub:ORG/NAME, local-dir:PATH, "
        "hf:ORG/NAME of transformers, or MODULE:CALLABLE of your own",
        Decides.RESULT,
        option="encoder",
        words=f"resnet18, of the demo plain {ENCODER}",
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
    encoder_options: tuple[tuple[str, float | str], ...] = setting(
        (),
        "what an encoder of your own is called with, name=value and comma-separated, such as width=64,depth=4",
        Decides.RESULT,
        option="encoder_options",
        kind=assignments,
        words="none",
    )
    aggregator: str = setting(
        "gated_abmil",
        "MIL pooling that turns a slide's features into its prediction, or MODULE:CLASS of your own",
        Decides.RESULT,
        option="aggregator",
        kind=AggregatorNames(AGGREGATORS),
        column=True,
    )
    scale_embedding: bool = setting(
        False,
        "learn a vector for each of --mpps, zero at the start, which is added to the features of its tiles",
        Decides.RESULT,
        option="scale_embedding",
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
    allow_code: tuple[str, ...] = setting(
        (),
        "modules, comma-separated, that a file of settings or of a model may have imported; what the command line "
        "itself names needs none",
        Decides.NOTHING,
        option="allow_code",
        kind=names,
        metavar="MODULE",
        words="none",
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
        "linear layers that get LoRA adapters: attention, all (the feed-forward ones too), or names, comma-separated",
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
        for option in ("encoder_options", "aggregator_options"):
            given = [name for name, _ in getattr(self, option)]
            if len(set(given)) < len(given):
                raise ValueError(f"--{option} must name an option once, got {', '.join(given)}")
        if self.dropout is not None and not 0 <= self.dropout <= 1:
            raise ValueError(f"--dropout must be in [0, 1], got {self.dropout}")
        if "dropout" in given:
            raise ValueError("--aggregator_options must not hold dropout. HINT: --dropout sets it.")
        from ds_wsi.models.aggregators import check_aggregator  # here, because help pages need no torch

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
        """Whether the encoder starts from weights: a file's, timm's, those of its name's place, or its own code's."""
        if self.encoder_weights is not None or self.pretrained:
            return True
        from ds_wsi.models.hub import says_weights  # here, because help pages need no timm

        return says_weights(self.encoder)
