"""What every command begins with: a parser of its own, which names what was misspelt and what was meant."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ds_wsi.commands import COMMANDS
from ds_wsi.commands.foreign_names import FOREIGN_NAMES
from ds_wsi.models.choices import AggregatorNames


class Help(argparse.RawDescriptionHelpFormatter):
    """A help page that shows one spelling of each option, that with underscores; that with dashes is taken too."""

    def __init__(self, prog: str, **how: Any) -> None:
        super().__init__(prog, max_help_position=28, **how)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        long = [option for option in action.option_strings if option.startswith("--")]
        shown = vars(action).get("shown") or ", ".join([*(set(action.option_strings) - set(long)), *long[:1]])
        if action.nargs == 0:
            return str(shown)
        return f"{shown} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and a remedy, not the usage of two hundred options."""

    def __init__(self, *names: Any, **how: Any) -> None:
        super().__init__(*names, **({"formatter_class": Help} | how))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; what is not known is refused here, by the command whose options are known."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with status 2."""
        hint = "" if "HINT" in message else f". HINT: {self.prog} --help lists the options."
        self.exit(2, f"{self.prog}: error: {message}{hint}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        further = action.choices.found() if isinstance(action.choices, AggregatorNames) else []
        choices = [str(choice) for choice in (*action.choices, *further)]
        near = _nearest(str(value), choices)
        hint = f"did you mean {near}?" if near else f"one of {', '.join(choices)}."
        raise argparse.ArgumentError(action, f"invalid choice: {value!r}. HINT: {hint}")

    def _meant(self, unknown: Sequence[str]) -> str:
        """A remedy for the first option that is not known."""
        spellings = [option for option in self._option_string_actions if option.startswith("--")]
        for word in unknown:
            name, _, _ = word.partition("=")
            if not name.startswith("--"):
                continue
            elsewhere = FOREIGN_NAMES.get(name[2:].replace("-", "_"))
            if elsewhere is not None and "--learning_rate" in spellings:  # a command that trains
                words = f"did you mean {elsewhere}?" if elsewhere.startswith("--") else f"here it is {elsewhere}."
                return f". HINT: {words}"
            near = _nearest(name.replace("-", "_").replace("__", "--", 1), spellings)
            if near:
                return f". HINT: did you mean {near}?"
        return ""


def _nearest(word: str, options: Sequence[str]) -> str | None:
    """The known word that is most like this one, whatever its case; or that it is a part of."""
    lower = {one.lower(): one for one in reversed(options)}
    near = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    parts = [one for one in lower if len(word.lstrip("-")) > 3 and word.lower().lstrip("-") in one]
    nearest = near[0] if near else parts[0] if parts else None
    return None if nearest is None else lower[nearest]


def add_command(
    subparsers: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    text: str | None = None,
) -> argparse.ArgumentParser:
    """Add the parser of a command, whose parsed options have `run`, which takes them.

    Args:
        run: the command; the exit status where it returns one, else 0.
        text: what it does; of `COMMANDS` where it is one of them.
    """
    words = COMMANDS[name][1] if text is None else text
    parser: argparse.ArgumentParser = subparsers.add_parser(name, help=words, description=words)
    parser.set_defaults(run=run)
    return parser


def first_word(arguments: Sequence[str] | None) -> str | None:
    """The command on a command line; None where there is none."""
    given = sys.argv[1:] if arguments is None else arguments
    return next((word for word in given if not word.startswith("-")), None)
