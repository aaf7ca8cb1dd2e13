"""`ds-wsi heatmap`: where an exported model looks."""

import argparse
from pathlib import Path

from ds_wsi.commands.cohort import tell_left_out
from ds_wsi.commands.parser import add_command
from ds_wsi.commands.predicting import (
    add_features_dir,
    add_model_options,
    manifest_of,
    model_and_slides,
    sharing_of,
    tell_old_norms,
)
from ds_wsi.runtime.streams import show
from ds_wsi.training.options import spellings


def add_heatmap(subparsers: argparse._SubParsersAction) -> None:
    """The options of `ds-wsi heatmap`."""
    parser = add_command(subparsers, "heatmap", run_heatmap)
    add_model_options(parser)
    parser.add_argument(*spellings("slide_ids"), help="ids of slides, comma-separated (default: all slides)")
    add_features_dir(parser)


def run_heatmap(options: argparse.Namespace) -> None:
    """`ds-wsi heatmap`; several processes share the slides."""
    from ds_wsi.evaluation.heatmap import is_heat_map
    from ds_wsi.evaluation.protocol import EvaluationProtocol
    from ds_wsi.evaluation.slide_maps import map_path
    from ds_wsi.runtime.own_files import require_ours

    options.manifest = manifest_of(options)
    directory = Path(options.output_dir)
    model, _, cohort = model_and_slides(options, "all", "unused")
    for part in cohort.parts():
        require_ours(map_path(directory, part), is_heat_map, "--output_dir")
    sharing = sharing_of(options, model, cohort, EvaluationProtocol())
    for drawn in sharing.draw():
        if sharing.shard.is_alone or drawn.drawn_here:
            for path in drawn.paths:
                show(path)
    sharing.failures.check()
    if sharing.shard.index == 0:
        tell_old_norms(options, sharing.model, cohort, sharing.policy, sharing.failures)
    tell_left_out(cohort, options.output_dir)
