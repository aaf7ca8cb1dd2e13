"""The console command `ds-wsi`: parse, then call. A command's libraries are imported when it is called.

A user's mistake ends with one message and exit status 2; what is no mistake of the user's, with its traceback and 1, as
does a `doctor` that found a failure. A command that was asked to end by a signal, or whose time is over, ends with 75:
the same command goes on.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from ds_wsi.commands import COMMANDS
from ds_wsi.commands.parser import Parser, first_word
from ds_wsi.runtime.errors import report
from ds_wsi.runtime.log import logger, setup_logging
from ds_wsi.runtime.signals import STATUS, Stopped, heeding_signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    setup_logging()
    options = build_parser(first_word(arguments) or "").parse_args(arguments)
    try:
        with heeding_signals():
            status: int = options.run(options) or 0
    except Exception as error:
        return report(error)
    except Stopped as stopped:
        logger.info("%s: the same command goes on%s", stopped, _how(options))
        return STATUS
    return status


def _how(options: argparse.Namespace) -> str:
    """The option that the same command wants to go on, where it has none."""
    option = vars(options).get("goes_on_with", "")
    return f", with --{option.rpartition('.')[2]}" if option and not vars(options).get(option) else ""


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all subcommands.

    Args:
        command: the one that is called: of the others the parser has the names alone, and imports nothing; None: all
            have their options.
    """
    parser = Parser("ds-wsi", description="End-to-end training of whole-slide-image models.")
    parser.add_argument("--version", action="version", version=f"ds-wsi {_version()}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        if command in (None, name):
            getattr(import_module(f"ds_wsi.commands.{module}"), f"add_{name}")(subparsers)
        else:
            subparsers.add_parser(name, help=text)
    return parser


def _version() -> str:
    try:
        return version("ds_wsi")
    except PackageNotFoundError:  # run from a folder that was not installed
        return "of a folder that is not installed"


if __name__ == "__main__":
    sys.exit(main())
