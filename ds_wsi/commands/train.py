"""`ds-wsi train` and `ds-wsi protocol`: one training, and the papers' experiments on a dataset."""

import argparse

from ds_wsi.bags.datasets import DATASETS
from ds_wsi.commands import COMMANDS
from ds_wsi.commands.parser import add_command
from ds_wsi.runtime.log import rank
from ds_wsi.runtime.streams import show
from ds_wsi.training.dataset_options import add_protocol_options
from ds_wsi.training.options import add_train_options, settings_from, spellings
from ds_wsi.training.setting_list import options_of

EXAMPLES = """examples:
  %(prog)s
      the demo cohort, from random weights
  %(prog)s --manifest cohort.csv --encoder resnet50 --pretrained --bf16 --output_dir runs/mine
      end to end; the same command with --resume_from_checkpoint goes on after a stop, with --dry_run it only checks
  %(prog)s --manifest cohort.csv --features_dir features --aggregator transmil --bags_per_step 32
      an aggregator on features that `ds-wsi features` wrote
"""


def add_train(subparsers: argparse._SubParsersAction) -> None:
    """The options of `ds-wsi train`."""
    parser = add_command(subparsers, "train", run_train)
    parser.epilog = EXAMPLES
    parser.set_defaults(goes_on_with="run.resume_from_checkpoint")
    add_train_options(parser)
    parser.add_argument(
        *spellings("write_config"),
        default=argparse.SUPPRESS,
        metavar="YAML",
        help="write all settings to a new file, for --config, and end (default: train)",
    )
    _add_dry_run(parser)


def run_train(options: argparse.Namespace) -> None:
    """`ds-wsi train`, and launch/train.py under any launcher."""
    from ds_wsi.training.loop import train  # here, because DeepSpeed and Accelerate take seconds to import

    settings, deepspeed_config = settings_from(options)
    if "write_config" in options:
        from ds_wsi.training.yaml_config import write_yaml

        if rank() == 0:
            write_yaml(settings, options.write_config)
            show(f"{options.write_config}: ds-wsi train --config {options.write_config} trains with it")
        return
    if options.dry_run:
        from ds_wsi.training.dry_run import dry_run

        _print_some(dry_run(settings, deepspeed_config, all_of_them=options.dry_run == "all"))
        return
    train(settings, deepspeed_config)


def add_protocol(subparsers: argparse._SubParsersAction) -> None:
    """The options of `ds-wsi protocol`, which has a command for each dataset."""
    protocol = subparsers.add_parser("protocol", help=COMMANDS["protocol"][1])
    datasets = protocol.add_subparsers(required=True, metavar="DATASET", dest="dataset", help="the dataset")
    for dataset in DATASETS:
        parser = add_command(
            datasets, dataset, run_protocol, f"the papers' experiments on {dataset}: see --list_presets"
        )
        add_protocol_options(parser, dataset)
        add_train_options(parser, without=("split_seed", *options_of("task")))
        _add_dry_run(parser)


def run_protocol(options: argparse.Namespace) -> None:
    """`ds-wsi protocol`, and launch/train_<dataset>.py under any launcher."""
    from ds_wsi.training.presets import describe, presets_of

    if "list_presets" in options:
        if rank() == 0:
            show(describe(presets_of(options.dataset)))
        return
    if "data_dir" not in options:
        raise ValueError("--data_dir must be given, got none. HINT: the folder into which the dataset was unpacked.")
    from ds_wsi.training.protocol import protocol_from, run_protocol

    protocol, settings, deepspeed_config, preset = protocol_from(options, options.dataset)
    if options.dry_run:
        from ds_wsi.training.dry_run import dry_protocol

        _print_some(dry_protocol(protocol, settings, deepspeed_config, all_of_them=options.dry_run == "all"))
        return
    _print_some(run_protocol(protocol, settings, deepspeed_config, preset.pretrained))


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        *spellings("dry_run"),
        nargs="?",
        const="changed",
        choices=("changed", "all"),
        metavar="all",
        help="check everything, tell slides, steps, time and the settings that differ from the defaults (with `all` "
        "every setting), and train nothing (default: train)",
    )


def _print_some(text: str) -> None:
    """Nothing on the processes that have nothing to say."""
    if text:
        show(text)
