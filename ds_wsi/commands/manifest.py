"""`ds-wsi manifest`: a public dataset's manifest."""

import argparse

from ds_wsi.bags.datasets import DATASETS
from ds_wsi.commands.parser import add_command
from ds_wsi.runtime.streams import show
from ds_wsi.runtime.words import counted
from ds_wsi.training.dataset_options import add_reading_options, add_split_options, reading_of, splitting_of
from ds_wsi.training.options import spellings


def add_manifest(subparsers: argparse._SubParsersAction) -> None:
    """The options of `ds-wsi manifest`."""
    parser = add_command(subparsers, "manifest", run_manifest)
    parser.add_argument("dataset", choices=sorted(DATASETS), help="dataset whose slides are listed")
    parser.add_argument(*spellings("data_dir"), required=True, help="the folder into which it was unpacked")
    parser.add_argument("--output", required=True, help="the CSV to write; of several splits one each, numbered")
    add_reading_options(parser)
    add_split_options(parser)


def run_manifest(options: argparse.Namespace) -> None:
    """`ds-wsi manifest`."""
    from ds_wsi.bags.prepare import read_dataset, split_dataset, write_manifests
    from ds_wsi.bags.summary import cohort_table

    given = vars(options)
    manifest = read_dataset(options.dataset, options.data_dir, reading_of(given))
    manifests = split_dataset(manifest, **splitting_of(given))
    for path, written in zip(write_manifests(manifests, options.output), manifests, strict=True):
        show(f"{path}\t{counted(len(written.slides), 'slide')}\t--classes {','.join(written.classes)}")
        show(cohort_table(written))
