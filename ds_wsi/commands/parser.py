"""What every command begins with: a parser of its own."""

import argparse
from collections.abc import Callable


def add_command(
    subparsers: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    """Add the parser of a command, whose parsed options have `run`, which takes them."""
    parser: argparse.ArgumentParser = subparsers.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser
