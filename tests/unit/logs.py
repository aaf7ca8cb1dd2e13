"""What the package logs, for tests: its logger may not propagate, so that caplog would miss it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ds_wsi.runtime.log import logger


@contextmanager
def logged(level: int = logging.INFO) -> Iterator[list[str]]:
    """The messages of this level and above, as they come; the logger is afterwards as it was."""
    messages: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: messages.append(record.getMessage())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
