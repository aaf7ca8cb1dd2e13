"""The console command `ds-wsi`: parse, then call.

A user's mistake ends with one message and exit status 2; everything else keeps its traceback.
"""

import argparse
import sys
from collections.abc import Sequence

from ds_wsi.commands.demo import add_demo
from ds_wsi.commands.evaluate import add_evaluate, add_heatmap
from ds_wsi.commands.features import add_features
from ds_wsi.commands.manifest import add_manifest
from ds_wsi.commands.plan import add_plan
from ds_wsi.commands.report import add_compare, add_report
from ds_wsi.commands.tile import add_tile
from ds_wsi.commands.train import add_protocol, add_train
from ds_wsi.runtime.log import logger, setup_logging


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    setup_logging()
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        # ManifestError, SlideError and every refused setting are ValueErrors, written for the user.
        logger.error("%s", error)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser("ds-wsi", description="End-to-end training of whole-slide-image models.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    add_demo(subparsers)
    add_manifest(subparsers)
    add_tile(subparsers)
    add_plan(subparsers)
    add_train(subparsers)
    add_protocol(subparsers)
    add_evaluate(subparsers)
    add_heatmap(subparsers)
    add_compare(subparsers)
    add_report(subparsers)
    add_features(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
