"""Tile encoders, slide aggregators, and the two together: plain modules, features are applied from outside."""

from typing import TYPE_CHECKING

from ds_wsi.runtime.lazy import lazily

if TYPE_CHECKING:
    from ds_wsi.models.aggregators import AGGREGATORS, build_aggregator
    from ds_wsi.models.choices import FEATURES
    from ds_wsi.models.config import ModelConfig, build_model, load_model, save_model
    from ds_wsi.models.encoder import NoEncoder, build_encoder
    from ds_wsi.models.freezing import freeze, freeze_until
    from ds_wsi.models.hub import EncoderSource, resolve_encoder
    from ds_wsi.models.lora import add_lora, merge_lora
    from ds_wsi.models.output import SlideOutput
    from ds_wsi.models.slide_model import SlideModel
    from ds_wsi.models.weights import load_encoder_weights
    from ds_wsi.models.weights_file import save_weights

__all__ = [
    "AGGREGATORS",
    "FEATURES",
    "EncoderSource",
    "ModelConfig",
    "NoEncoder",
    "SlideModel",
    "SlideOutput",
    "add_lora",
    "build_aggregator",
    "build_encoder",
    "build_model",
    "freeze",
    "freeze_until",
    "load_encoder_weights",
    "load_model",
    "merge_lora",
    "resolve_encoder",
    "save_model",
    "save_weights",
]

# The aggregators need no timm.
__getattr__ = lazily(
    __name__,
    {
        "ds_wsi.models.aggregators": (
            "AGGREGATORS",
            "build_aggregator",
        ),
        "ds_wsi.models.config": (
            "ModelConfig",
            "build_model",
            "load_model",
            "save_model",
        ),
        "ds_wsi.models.encoder": (
            "NoEncoder",
            "build_encoder",
        ),
        "ds_wsi.models.choices": ("FEATURES",),
        "ds_wsi.models.freezing": (
            "freeze",
            "freeze_until",
        ),
        "ds_wsi.models.hub": (
            "EncoderSource",
            "resolve_encoder",
        ),
        "ds_wsi.models.lora": (
            "add_lora",
            "merge_lora",
        ),
        "ds_wsi.models.output": ("SlideOutput",),
        "ds_wsi.models.slide_model": ("SlideModel",),
        "ds_wsi.models.weights": ("load_encoder_weights",),
        "ds_wsi.models.weights_file": ("save_weights",),
    },
)
