"""One logger for the package; only rank 0 speaks unless a message is about its own rank.

[Note: a user's own script] There the package's messages are shown as the command line shows them, until logging is set
up: once the root logger or the package's has a handler of the user's, all is left to it, its level too, so that nothing
is printed twice.
"""

import logging
import os
import sys


class _OnStandardError(logging.Handler):
    """Prints where nobody else does ([Note: a user's own script]); under the command line always."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line to what is standard error now."""
        if logger.propagate and _set_up_by_user():
            return
        try:
            bars = sys.modules.get("tqdm")
            if bars is None:
                sys.stderr.write(self.format(record) + "\n")
            else:  # above a bar, which is drawn again below
                bars.tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class _Logger(logging.Logger):
    """A logger whose level, while nobody has set it, is the user's root's, or INFO where there is none."""

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 (logging's name)
        """Answer as logging does, without its cache: what a user sets up later counts."""
        return not self.disabled and self.manager.disable < level and level >= self.getEffectiveLevel()

    def getEffectiveLevel(self) -> int:  # noqa: N802 (logging's name)
        """See the class."""
        if self.level:
            return self.level
        return logging.getLogger().getEffectiveLevel() if _set_up_by_user() else level_of_rank()


def rank() -> int:
    """This process's rank as its launcher set it (0 without a launcher).

    Raises:
        ValueError: RANK is no number.
    """
    text = os.environ.get("RANK") or "0"
    try:
        return int(text)
    except ValueError:
        hint = "unset it, or start the command by its launcher"
        raise ValueError(f"RANK must be a number, got {text!r}. HINT: {hint}.") from None


def level_of_rank(level: int = logging.INFO) -> int:
    """Everything on rank 0, warnings and errors on the others; everything too where RANK is no number."""
    try:
        return level if rank() == 0 else max(level, logging.WARNING)
    except ValueError:  # who needs the rank refuses it: a help page does not
        return level


def _set_up_by_user() -> bool:
    return bool(logging.getLogger().handlers) or any(one is not _handler for one in logger.handlers)


def setup_logging(level: int = logging.INFO) -> None:
    """Send the package's messages to standard error, whatever else logs: the command line's way."""
    if not logger.handlers:
        logger.addHandler(_handler)
    logger.setLevel(level_of_rank(level))
    logger.propagate = False


logger = logging.getLogger("ds_wsi")
logger.__class__ = _Logger
_handler = _OnStandardError()
_handler.setFormatter(logging.Formatter("[ds_wsi] %(levelname)s: %(message)s"))
if not logger.handlers:
    logger.addHandler(_handler)
