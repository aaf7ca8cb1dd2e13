"""`ds-wsi features`: each slide's features, for training without an encoder."""

import argparse
from dataclasses import asdict, fields

from ds_wsi.commands.cohort import (
    TILING_OPTIONS,
    add_prediction_options,
    classes_of,
    device_of,
    slides_of,
    tile_reading_of,
)
from ds_wsi.commands.parser import add_command
from ds_wsi.config import read_section
from ds_wsi.runtime.log import logger
from ds_wsi.slides.tiling import TilingPolicy
from ds_wsi.training.options import spellings


def add_features(subparsers: argparse._SubParsersAction) -> None:
    """The options of `ds-wsi features`."""
    parser = add_command(subparsers, "features", run_features, "write each slide's features")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a run's folder, whose encoder and tiles are taken")
    source.add_argument("--encoder", help="a timm model's name")
    parser.add_argument(*spellings("encoder_weights"), help="of --encoder: local .safetensors file or timm checkpoint")
    for entry in fields(TilingPolicy):
        if entry.name in TILING_OPTIONS:
            text = f"with --encoder (default: {entry.default})"
            parser.add_argument(*spellings(entry.name), type=type(entry.default), default=argparse.SUPPRESS, help=text)
    add_prediction_options(parser, need_manifest=True)


def run_features(options: argparse.Namespace) -> None:
    """`ds-wsi features`."""
    import torch

    from ds_wsi.evaluation.extract import extract_features
    from ds_wsi.models import ModelConfig, build_model, load_model

    of_tiles = {name: value for name, value in vars(options).items() if name in TILING_OPTIONS}
    if options.model:
        given = [*of_tiles, *(["encoder_weights"] if options.encoder_weights else [])]
        if given:
            names = ", ".join(f"--{name}" for name in given)
            raise ValueError(f"{names} must be given with --encoder alone, got --model, which has its own")
        model, config = load_model(options.model)
        if config.encoder is None:
            raise ValueError(f"--model must have an encoder, got {options.model}, a model of features")
        tiling = read_section({"tiling": config.tiling}).tiling
    else:
        tiling = TilingPolicy(**of_tiles)
        # Of a SlideModel the encoder alone is used.
        config = ModelConfig(options.encoder, "mean", ("none", "none"), asdict(tiling))
        if options.encoder_weights is None:
            logger.warning("--encoder_weights is not given: %s has random weights (seed 0)", options.encoder)
        torch.manual_seed(0)  # the same features when the command is given again
        model = build_model(config, options.encoder_weights)
    cohort = slides_of(options, tiling, classes_of(options))
    policy, failures = tile_reading_of(options, cohort)
    for slide in extract_features(model.to(device_of(options)), config, cohort, options.output_dir, policy, failures):
        print(f"{slide.slide_id}\t{slide.n_rows} rows\t{'written' if slide.written else 'kept'}\t{slide.path}")
    print(f"{options.output_dir}\twidth {model.encoder.num_features}, {len(failures.reasons)} tiles unreadable")
