"""The console command `ds-wsi`: parse, then call. A command's libraries are imported when it is called.

A user's mistake ends with one message and exit status 2; what is no mistake of the user's, with its traceback and 1, as
does a `doctor` that found a failure. A command that was asked to end by a signal, or whose time is over, ends with 75:
the same command goes on.

Little is imported here before the signals are heeded: until then they end the process as they end Python.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ds_wsi.runtime.log import logger, setup_logging
from ds_wsi.runtime.signals import STATUS, Stopped, heeding_signals, stop_where_asked
from ds_wsi.runtime.streams import open_closed_streams, settle_streams

if TYPE_CHECKING:
    import argparse


def main(arguments: Sequence[str] | None = None, *, ends_process: bool = False) -> int:
    """Run one subcommand; returns the exit status.

    Args:
        arguments: words of the command line; None takes those of the process, which ends with this.
        ends_process: whether the process ends with this; signals that come later then change nothing.
    """
    options = None
    open_closed_streams()
    try:
        with heeding_signals(to_the_end=ends_process or arguments is None):
            setup_logging()
            options = _parsed(arguments)
            stop_where_asked()  # a library's import can have taken the exception for its own
            status: int = options.run(options) or 0
    except Exception as error:
        from ds_wsi.runtime.errors import report

        return report(error)
    except Stopped as stopped:
        logger.info("%s: the same command goes on%s", stopped, _how(options))
        return STATUS
    finally:
        settle_streams()
    return status


def _parsed(arguments: Sequence[str] | None) -> "argparse.Namespace":
    from ds_wsi.commands.parser import first_word

    return build_parser(first_word(arguments) or "").parse_args(arguments)


def _how(options: "argparse.Namespace | None") -> str:
    """The option that the same command wants to go on, where it has none."""
    if options is None:
        return ""
    option = vars(options).get("goes_on_with", "")
    return f", with --{option.rpartition('.')[2]}" if option and not vars(options).get(option) else ""


def build_parser(command: str | None = None) -> "argparse.ArgumentParser":
    """The parser of all subcommands.

    Args:
        command: the one that is called: of the others the parser has the names alone, and imports nothing; None: all
            have their options.
    """
    from importlib import import_module

    from ds_wsi.commands import COMMANDS
    from ds_wsi.commands.parser import Parser

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
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ds_wsi")
    except PackageNotFoundError:  # run from a folder that was not installed
        return "of a folder that is not installed"


if __name__ == "__main__":
    sys.exit(main())
