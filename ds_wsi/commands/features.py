"""`ds-wsi features`: each slide's features, for training without an encoder."""

import argparse
from dataclasses import replace
from pathlib import Path

from ds_wsi.commands.cohort import (
    OF_EVALUATION,
    TILING_OPTIONS,
    add_prediction_options,
    classes_of,
    labels_of,
    placed,
    shard_from,
    slides_of,
    tell_left_out,
    tile_reading_of,
    tiling_of,
)
from ds_wsi.commands.parser import add_command
from ds_wsi.commands.predicting import add_norm_evaluation, tell_old_norms
from ds_wsi.config import read_section
from ds_wsi.models.choices import FEATURES
from ds_wsi.runtime.streams import show
from ds_wsi.runtime.words import counted
from ds_wsi.slides.policy import TilingPolicy
from ds_wsi.training.options import add_shared_options, spellings

SUMMARY, SUMMARY_COLUMNS = "features_summary.csv", ("slide_id", "n_rows", "n_unreadable")


def add_features(subparsers: argparse._SubParsersAction) -> None:
    """The options of `ds-wsi features`."""
    parser = add_command(subparsers, "features", run_features)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a run's folder, whose encoder and tiles are taken")
    words = "a timm model's name, hf-hub:ORG/NAME, local-dir:PATH, or MODULE:CALLABLE of your own"
    source.add_argument("--encoder", help=words)
    add_shared_options(parser, ("encoder_options", "allow_code"))
    parser.add_argument(*spellings("encoder_weights"), help="file that --encoder starts from (default: RANDOM weights)")
    parser.add_argument("--pretrained", action="store_true", help="weights that timm has for --encoder's name")
    parser.add_argument(
        *spellings("encoder_features"), choices=FEATURES, help="what leaves --encoder (default: as its authors do)"
    )
    for name in TILING_OPTIONS:
        add_shared_options(parser, (name,), default=f"{getattr(TilingPolicy(), name)}; with --model, the model's own")
    add_norm_evaluation(parser)
    add_prediction_options(parser, need_manifest=True)


def run_features(options: argparse.Namespace) -> None:
    """`ds-wsi features`."""
    from ds_wsi.bags.shards import SummaryFile
    from ds_wsi.evaluation.extract import build_extractor, extract_features
    from ds_wsi.models import load_model

    of_tiles = {name: value for name, value in vars(options).items() if name in TILING_OPTIONS}
    if options.model:
        of_encoder = ("encoder_weights", "pretrained", "encoder_features", "encoder_options")
        given = [name for name in of_tiles if name not in OF_EVALUATION]
        given += [name for name in of_encoder if getattr(options, name)]
        if given:
            names = ", ".join(f"--{name}" for name in given)
            raise ValueError(f"{names} must be given with --encoder alone, got --model, which has its own")
        model, config = load_model(options.model, allow_code=options.allow_code)
        if config.encoder is None:
            raise ValueError(f"--model must have an encoder, got {options.model}, a model of features")
        tiling = tiling_of(options, read_section({"tiling": config.tiling}).tiling)
    else:
        tiling = TilingPolicy(**of_tiles)
        model, config = build_extractor(
            options.encoder,
            tiling,
            options.encoder_weights,
            pretrained=options.pretrained,
            features=options.encoder_features,
            options=dict(options.encoder_options),
        )
    if options.norm_evaluation:
        config = replace(config, norm_evaluation=options.norm_evaluation)
        model.set_norms(evaluation=options.norm_evaluation)
    cohort = slides_of(options, tiling, classes_of(options), labels_of(options))
    policy, failures = tile_reading_of(options, cohort)
    shard = shard_from(options)
    summary = SummaryFile(Path(options.output_dir) / SUMMARY, SUMMARY_COLUMNS)
    n_rows_of: dict[str, int] = {}
    model = placed(model, options)
    for slide in extract_features(model, config, cohort, options.output_dir, policy, failures, shard):
        n_rows_of[slide.slide_id] = slide.n_rows
        word = "written" if slide.written else "kept"
        if slide.written or shard.is_alone:
            show(f"{slide.slide_id}\t{counted(slide.n_rows, 'row')}\t{word}\t{slide.path}")
    unreadable = {grid.slide_id: len(grid) - n_rows_of[grid.slide_id] for grid in cohort.tile_grids}
    failures.check_counts(unreadable)
    summary.write([(name, n_rows_of[name], n_failed) for name, n_failed in unreadable.items()])
    show(
        f"{options.output_dir}\twidth {model.encoder.num_features}, "
        f"{counted(sum(unreadable.values()), 'tile')} unreadable"
    )
    comparable = not options.classes or cohort.manifest.classes == config.classes
    if options.model and shard.index == 0 and comparable:  # when all is on disk: a check must not cost the features
        tell_old_norms(options, model, cohort, policy, failures)
    tell_left_out(cohort, options.output_dir)
