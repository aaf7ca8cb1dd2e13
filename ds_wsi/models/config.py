"""What is needed to rebuild a model: its sizes and names, read from and written to config.json."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import load_file

from ds_wsi.models.aggregators import build_aggregator
from ds_wsi.models.encoder import IMAGENET_MEAN, IMAGENET_STD, build_encoder
from ds_wsi.models.slide_model import SlideModel
from ds_wsi.runtime.files import write_json

VERSION = 2  # 1 had no encoder_features and encoder_options


@dataclass(frozen=True)
class ModelConfig:
    """A SlideModel's names and sizes.

    Args:
        encoder: a timm model's name, of the architecture: nothing is downloaded to build it.
        aggregator: a key of `AGGREGATORS`.
        classes: the class names, in the order of the logits.
        tiling: the fields of the TilingPolicy of the tiles it was trained on; evaluation tiles slides the same way.
        mean, std: of the input's channels.
        dropout: of the aggregator; None for its original's.
        encoder_features: what leaves the encoder, one of `FEATURES`.
        encoder_options: of `timm.create_model`, as JSON has them.
    """

    encoder: str
    aggregator: str
    classes: tuple[str, ...]
    tiling: dict[str, Any]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    dropout: float | None = None
    encoder_features: str = "pooled"
    encoder_options: dict[str, Any] = field(default_factory=dict)

    @property
    def tile_size_px(self) -> int:
        """Side of the tiles."""
        return int(self.tiling["tile_size_px"])

    def write(self, path: str | Path) -> None:
        """Write config.json atomically."""
        write_json(path, {"format": "ds_wsi.SlideModel", "version": VERSION, **asdict(self)})

    @classmethod
    def read(cls, path: str | Path) -> "ModelConfig":
        """Read config.json, of this version or the one before.

        Raises:
            ValueError: the file is missing, of another format or version, or lacks a key.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"the model's folder must hold config.json, got none at {path}")
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = values.pop("version", None)
        if values.pop("format", None) != "ds_wsi.SlideModel" or version not in (1, VERSION):
            raise ValueError(
                f"config.json must be of format ds_wsi.SlideModel version 1 or {VERSION}, got another ({path})"
            )
        known = {entry.name for entry in fields(cls)}
        if version == 1:
            known -= {"encoder_features", "encoder_options"}
        if set(values) != known:
            raise ValueError(f"config.json must hold the keys {sorted(known)}, got {sorted(values)} ({path})")
        for key in ("classes", "mean", "std"):
            values[key] = tuple(values[key])
        return cls(**values)


def build_model(
    config: ModelConfig, encoder_weights: str | Path | None = None, encoder_source: str | None = None
) -> SlideModel:
    """Build the SlideModel that `config` describes, with random weights but for the encoder's where given.

    Args:
        config: of the model.
        encoder_weights: a local file.
        encoder_source: what timm finds pretrained weights by, see `build_encoder`.
    """
    encoder = build_encoder(
        config.encoder,
        encoder_weights,
        source=encoder_source,
        features=config.encoder_features,
        tile_size_px=config.tile_size_px,
        **{**config.encoder_options, **_input_size(config)},
    )
    in_dim: Any = encoder.num_features
    options = {} if config.dropout is None else {"dropout": config.dropout}
    aggregator = build_aggregator(config.aggregator, in_dim, len(config.classes), **options)
    return SlideModel(encoder, aggregator, config.mean, config.std)


def load_model(directory: str | Path) -> tuple[SlideModel, ModelConfig]:
    """Rebuild an exported model from a folder's config.json and model.safetensors, in evaluation mode."""
    directory = Path(directory)
    config = ModelConfig.read(directory / "config.json")
    model = build_model(config)
    weights = directory / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"the model's folder must hold model.safetensors, got none at {weights}")
    model.load_state_dict(load_file(weights))
    return model.eval(), config


def _input_size(config: ModelConfig) -> dict[str, object]:
    # Models with position embeddings are built for one input size; convolutional ones take any and refuse the option.
    entry = timm.models.model_entrypoint(config.encoder) if timm.is_model(config.encoder) else None
    fixed = entry is not None and timm.get_pretrained_cfg(config.encoder, allow_unregistered=True)
    # Positions of one size, which the model itself fits to the tiles it gets.
    if config.encoder_options.get("dynamic_img_size"):
        return {}
    return {"img_size": config.tile_size_px} if fixed and fixed.fixed_input_size else {}
