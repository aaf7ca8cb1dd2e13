"""What is needed to rebuild a model: its sizes and names, read from and written to config.json."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ds_wsi.models.aggregators import build_aggregator, require_serves, require_unordered
from ds_wsi.models.choices import AGGREGATORS, BAGS
from ds_wsi.models.encoder import IMAGENET_MEAN, IMAGENET_STD, NoEncoder, build_encoder
from ds_wsi.models.hub import EncoderSource, is_own_encoder
from ds_wsi.models.ordinal_answer import answer_of
from ds_wsi.models.own import AGGREGATOR, ENCODER, is_own, require_allowed
from ds_wsi.models.slide_model import SlideModel
from ds_wsi.models.weights_file import WeightsFileError, read_weights, require_finite, save_weights
from ds_wsi.norms.policy import EVALUATION, TRAINING
from ds_wsi.runtime.files import read_object, write_json
from ds_wsi.targets.several import AnyTask, task_from_json

VERSION = 8
NORMS_SINCE = 4
NEW_IN: dict[int, dict[str, Any]] = {
    2: {"in_dim": None, "encoder_features": "pooled", "encoder_options": {}},
    3: {"aggregator_options": {}},
    4: {"norm_training": "bag", "norm_evaluation": "running"},  # older models were exported so, whatever they trained
    5: {"fixed_norms": []},  # they were evaluated as if all norms had trained alike
    6: {"task": {}},  # classification was the only one
    7: {},  # one target was the most: the task's kind "several" is new
    8: {"bag": BAGS[0], "mpps": [], "scale_embedding": False},  # bags were of slides, at one magnification
}


# Of the values in a file: what they may be.
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("aggregator", "encoder_features", "norm_training", "norm_evaluation", "bag"), (str,)),
    **dict.fromkeys(("classes", "mean", "std", "fixed_norms", "mpps"), (tuple,)),
    "scale_embedding": (bool,),
    **dict.fromkeys(("tiling", "aggregator_options", "encoder_options", "task"), (dict,)),
    "encoder": (str, type(None)),
    "in_dim": (int, type(None)),
    "dropout": (float, int, type(None)),
}


@dataclass(frozen=True)
class ModelConfig:
    """A SlideModel's names and sizes.

    Args:
        encoder: a timm architecture: nothing is downloaded to build it; or a name of own code, see `ds_wsi.models.own`;
            None for a model of features.
        aggregator: a key of `AGGREGATORS`, or a name of own code.
        classes: the class names, in the order of the logits; two or more. Of another task its grades or labels.
        tiling: the TilingPolicy of the tiles it was trained on, or its fields; evaluation tiles slides the same way.
            Empty for a model of features.
        mean, std: the channels' statistics that the input is normalised by.
        dropout: the aggregator's; None for its original's.
        aggregator_options: other arguments of its constructor, as JSON has them; others are as in its original.
        in_dim: the width of the features of a model of features; None with an encoder, which has its own.
        encoder_features: what leaves the encoder, one of `FEATURES`.
        encoder_options: arguments of `timm.create_model`, or of own code, as JSON has them.
        norm_training: what the encoder's BatchNorm averaged over in training, of a `NormPolicy`, and not "auto".
        norm_evaluation: what it averages over in evaluation; "recalibrated" statistics are in the weights.
        fixed_norms: the encoder's norms that kept their running statistics in training, and keep them in evaluation.
        task: empty: classification. Else `Task.to_json`'s values, or `SeveralTargets.to_json`'s, and what was fitted on
            the run's own splits.
        bag: what a bag was of, one of `BAGS`; it is evaluated on the same.
        mpps: resolutions of the tiles in a bag, um/px, the finest first, which is `tiling`'s; empty: that alone.
        scale_embedding: whether the model has an embedding of them.
    """

    encoder: str | None
    aggregator: str
    classes: tuple[str, ...]
    tiling: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    dropout: float | None = None
    aggregator_options: dict[str, Any] = field(default_factory=dict)
    in_dim: int | None = None
    encoder_features: str = "pooled"
    encoder_options: dict[str, Any] = field(default_factory=dict)
    norm_training: str = "bag"
    norm_evaluation: str = "running"
    fixed_norms: tuple[str, ...] = ()
    task: dict[str, Any] = field(default_factory=dict)
    bag: str = BAGS[0]
    mpps: tuple[float, ...] = ()
    scale_embedding: bool = False

    def __post_init__(self) -> None:
        """Take a policy's fields; refuse an encoder beside features of a given width, neither, or unknown values."""
        tiling: Any = self.tiling
        if is_dataclass(tiling) and not isinstance(tiling, type):
            object.__setattr__(self, "tiling", asdict(tiling))
        for name, choices in (
            *(("norm_training", TRAINING[1:]), ("norm_evaluation", EVALUATION[1:])),
            ("bag", BAGS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if (self.encoder is None) == (self.in_dim is None):
            raise ValueError(
                f"a model must have either an encoder or in_dim, got encoder {self.encoder!r} and in_dim {self.in_dim}"
            )
        if self.task:
            _ = self.target_task  # refuses what is none
        elif len(self.classes) < 2:
            raise ValueError(
                f"classes must be two or more, in the order of the logits, got {list(self.classes)}. "
                "HINT: build_aggregator(name, in_dim, num_classes=1) has one logit, for a loss of your own."
            )
        if self.encoder is not None and "tile_size_px" not in self.tiling:
            raise ValueError(
                f"tiling must be given with an encoder, got {self.tiling}. HINT: TilingPolicy(tile_size_px=256)"
            )

    @classmethod
    def of_source(
        cls,
        source: EncoderSource,
        aggregator: str,
        classes: tuple[str, ...],
        tiling: dict[str, Any],
        *,
        features: str | None = None,
        dropout: float | None = None,
        aggregator_options: Mapping[str, Any] | None = None,
        task: Mapping[str, Any] | None = None,
        bag: str = BAGS[0],
        mpps: tuple[float, ...] = (),
        scale_embedding: bool = False,
    ) -> "ModelConfig":
        """The config with an encoder as its authors use it; `features` None takes what they take from it."""
        return cls(
            encoder=source.architecture,
            aggregator=aggregator,
            classes=classes,
            tiling=tiling,
            mean=source.mean,
            std=source.std,
            dropout=dropout,
            aggregator_options=dict(aggregator_options or {}),
            encoder_features=features or source.features,
            encoder_options=dict(source.options),
            task=dict(task or {}),
            bag=bag,
            mpps=mpps,
            scale_embedding=scale_embedding,
        )

    @property
    def target_task(self) -> AnyTask | None:
        """The task, where it is another than classification."""
        return task_from_json(self.task, self.classes)

    @property
    def tile_size_px(self) -> int:
        """Side of the tiles."""
        return int(self.tiling["tile_size_px"])

    @property
    def own_code(self) -> dict[str, str]:
        """Kind ("encoder", "aggregator") -> name of own code: to build the model imports its module."""
        names = {}
        if self.encoder is not None and is_own_encoder(self.encoder):
            names[ENCODER] = self.encoder
        if self.aggregator not in AGGREGATORS and is_own(self.aggregator, AGGREGATOR):
            names[AGGREGATOR] = self.aggregator
        return names

    def write(self, path: str | Path) -> None:
        """Write config.json atomically."""
        write_json(path, {"format": "ds_wsi.SlideModel", "version": VERSION, **asdict(self)})

    @classmethod
    def read(cls, path: str | Path) -> "ModelConfig":
        """Read config.json, of this version or one before.

        Raises:
            ValueError: the file is missing, of another format or version, or lacks a key.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"the model's folder must hold config.json, got none at {path}")
        values = read_object(path, "config.json")
        version = values.pop("version", None)
        is_version = type(version) is int and 1 <= version <= VERSION
        if values.pop("format", None) != "ds_wsi.SlideModel" or not is_version:
            raise ValueError(
                f"config.json must be of format ds_wsi.SlideModel, version 1 to {VERSION}, got another ({path}). HINT: "
                "what save_pretrained wrote is read by ds_wsi.SlideModelForSlideClassification"
            )
        for newer in range(version + 1, VERSION + 1):
            values = NEW_IN[newer] | values
        return cls.from_values(values, str(path))

    @classmethod
    def from_values(cls, values: dict[str, Any], place: str) -> "ModelConfig":
        """The config of `asdict`'s values, with lists where JSON has no tuples; `place` is named in errors.

        Raises:
            ValueError: a key is missing or unknown.
        """
        values = NEW_IN[5] | NEW_IN[6] | NEW_IN[7] | NEW_IN[8] | values  # Transformers' files say no version
        names = {entry.name for entry in fields(cls)}
        if set(values) != names:
            raise ValueError(f"config.json must hold the keys {sorted(names)}, got {sorted(values)} ({place})")
        fitted: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        for name, kinds in _KINDS.items():
            if type(fitted[name]) not in kinds:
                raise ValueError(f"{name} must be of type {kinds[0].__name__}, got {values[name]!r} ({place})")
        for name in ("mean", "std"):
            channels = fitted[name]
            if len(channels) != 3 or not all(type(value) in (int, float) and isfinite(value) for value in channels):
                raise ValueError(f"{name} must be three numbers, one for each channel, got {values[name]!r} ({place})")
        return cls(**fitted)


def stored_version(directory: str | Path) -> int:
    """The version of a folder's config.json: what was exported before 4 says nothing of its norms."""
    return int(read_object(Path(directory) / "config.json", "config.json")["version"])


def build_model(
    config: ModelConfig,
    encoder_weights: str | Path | None = None,
    encoder_source: str | None = None,
    *,
    allow_code: Collection[str] = (),
) -> SlideModel:
    """Build the SlideModel that `config` describes, with random weights but for the encoder's where given.

    Args:
        config: the model's names and sizes.
        encoder_weights: a local file.
        encoder_source: what timm finds pretrained weights by, see `build_encoder`.
        allow_code: modules (or whole names) of own code that may be imported: a config can be a stranger's.

    Raises:
        ValueError: it names own code that is not allowed, or does not describe a model.
    """
    require_allowed(config.own_code, allow_code, "a ModelConfig")
    if config.encoder is None:
        assert config.in_dim is not None
        encoder: nn.Module = NoEncoder(config.in_dim)
    else:
        encoder = build_encoder(
            config.encoder,
            encoder_weights,
            source=encoder_source,
            features=config.encoder_features,
            tile_size_px=config.tile_size_px,
            **{**config.encoder_options, **_input_size(config.encoder, config)},
        )
    in_dim: Any = encoder.num_features
    options = dict(config.aggregator_options) | ({} if config.dropout is None else {"dropout": config.dropout})
    task = config.target_task
    if task is not None:
        require_serves(config.aggregator, task.kind)
    n_outputs = len(config.classes) if task is None else task.aggregator_outputs
    aggregator = build_aggregator(config.aggregator, in_dim, n_outputs, **options)
    if task is not None:
        require_serves(config.aggregator, task.kind, aggregator)
    if config.bag != BAGS[0] or config.mpps:
        what = "--mpps" if config.mpps else f"--bag {config.bag}"
        require_unordered(config.aggregator, what, aggregator)
    scales = scale_embedding(len(config.mpps), in_dim) if config.scale_embedding else None
    model = SlideModel(encoder, aggregator, config.mean, config.std, answer_of(task), scales)
    norms = config.norm_training, config.norm_evaluation
    # The defaults are nobody's choice: whoever trains the model may choose.
    if norms == (model.norm_training, model.norm_evaluation) and not config.fixed_norms:
        return model
    return model.set_norms(*norms, config.fixed_norms)


def scale_embedding(n_scales: int, in_dim: int) -> nn.Embedding:
    """A vector [in_dim] for each magnification, zero at the start: at first the model is what it is without."""
    embedding = nn.Embedding.from_pretrained(torch.zeros(n_scales, in_dim), freeze=False)
    return embedding


def load_model(directory: str | Path, *, allow_code: Collection[str] = ()) -> tuple[SlideModel, ModelConfig]:
    """Rebuild an exported model from a folder's config.json and model.safetensors, in evaluation mode.

    Args:
        directory: the folder.
        allow_code: modules (or whole names) of own code that config.json may have imported; see
            docs/how_to/own_model.md.

    Raises:
        ValueError: one of the two is missing, is another kind of file, or is of another model; config.json names own
            code that is not allowed.
    """
    directory = Path(directory)
    config = ModelConfig.read(directory / "config.json")
    require_allowed(config.own_code, allow_code, directory / "config.json")
    try:
        model = build_model(config, allow_code=allow_code)
    except Exception as error:  # timm and torch refuse sizes and options that are none in many ways
        raise ValueError(
            f"config.json must describe a model, got {type(error).__name__}: {error} ({directory / 'config.json'})"
        ) from error
    weights = directory / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"the model's folder must hold model.safetensors, got none at {weights}")
    try:
        model.load_state_dict(read_weights(weights))
        require_finite(model)
    except (WeightsFileError, RuntimeError) as error:
        raise ValueError(
            f"the model's weights must be safetensors of the model that config.json describes, got others "
            f"({str(error).splitlines()[0]}, {weights}). HINT: copy the whole folder again."
        ) from error
    model.norms_from = "config.json"
    return model.eval(), config


def save_model(directory: str | Path, config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors, each atomically: what `load_model` reads."""
    directory = Path(directory)
    config.write(directory / "config.json")
    save_weights(directory / "model.safetensors", state)


def _input_size(encoder: str, config: ModelConfig) -> dict[str, object]:
    # Models with position embeddings are built for one input size; convolutional ones take any and refuse the option.
    entry = timm.models.model_entrypoint(encoder) if timm.is_model(encoder) else None
    fixed = entry is not None and timm.get_pretrained_cfg(encoder, allow_unregistered=True)
    # Positions of one size, which the model itself fits to the tiles it gets.
    if config.encoder_options.get("dynamic_img_size"):
        return {}
    return {"img_size": config.tile_size_px} if fixed and fixed.fixed_input_size else {}
