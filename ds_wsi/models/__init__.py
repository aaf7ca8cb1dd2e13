"""Tile encoders, slide aggregators, and the two together: plain modules, features are applied from outside."""

from ds_wsi.models.aggregators import AGGREGATORS, build_aggregator
from ds_wsi.models.config import ModelConfig, build_model, load_model, save_model, save_weights
from ds_wsi.models.encoder import NoEncoder, build_encoder, freeze, load_encoder_weights
from ds_wsi.models.output import SlideOutput
from ds_wsi.models.slide_model import SlideModel

__all__ = [
    "AGGREGATORS",
    "ModelConfig",
    "NoEncoder",
    "SlideModel",
    "SlideOutput",
    "build_aggregator",
    "build_encoder",
    "build_model",
    "freeze",
    "load_encoder_weights",
    "load_model",
    "save_model",
    "save_weights",
]
