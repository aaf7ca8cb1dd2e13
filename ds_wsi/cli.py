"""The console command `ds-wsi`: parse, then call. A command's libraries are imported when it is called.

A user's mistake ends with one message and exit status 2; what is no mistake of the user's, with its traceback and 1.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from ds_wsi.commands import COMMANDS
from ds_wsi.commands.parser import Parser, first_word
from ds_wsi.runtime.errors import report
from ds_wsi.runtime.log import setup_logging


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    setup_logging()
    options = build_parser(first_word(arguments) or "").parse_args(arguments)
    try:
        options.run(options)
    except Exception as error:
        return report(error)
    return 0


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
