"""One logger for the package; only rank 0 speaks unless a message is about its own rank."""

import logging
import os
import sys

logger = logging.getLogger("ds_wsi")


def rank() -> int:
    """This process's rank as its launcher set it (0 without a launcher)."""
    return int(os.environ.get("RANK", "0"))


def setup_logging(level: int = logging.INFO) -> None:
    """Send the package's messages to standard error: everything on rank 0, warnings and errors on the others."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("[ds_wsi] %(levelname)s: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(level if rank() == 0 else logging.WARNING)
    logger.propagate = False
