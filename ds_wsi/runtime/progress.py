"""How far a long command is: a bar with the time left, or lines where standard error is no terminal."""

import sys
import threading
import time
from types import TracebackType

from tqdm import tqdm

from ds_wsi.runtime.log import logger

LINE_EVERY = 0.1  # of the whole
QUIET_SECONDS = 5.0  # what takes less needs no lines


class Progress:
    """Counts what is done; usable from several threads.

    Args:
        what: is being done, such as "tiling".
        unit: of what is counted.
        total: of them; it may be told with the first `step`.
    """

    def __init__(self, what: str, unit: str, total: int | None = None) -> None:
        self.what, self.unit, self.total = what, unit, total
        self.done = 0
        self._started = time.monotonic()
        self._told = 0.0
        self._lock = threading.Lock()
        self._bar: tqdm | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def step(self, total: int | None = None) -> None:
        """One more is done, of `total`."""
        with self._lock:
            self.total = total or self.total
            self.done += 1
            if sys.stderr.isatty():
                self._bar = self._bar or tqdm(total=self.total, desc=self.what, unit=self.unit, leave=False)
                self._bar.update()
            elif self.total and self.seconds > QUIET_SECONDS:
                self._tell_line(self.done / self.total)

    def _tell_line(self, share: float) -> None:
        if share < 1 and share < self._told + LINE_EVERY:
            return
        self._told = share
        left = self.seconds * (1 - share) / share
        logger.info(
            "%s: %d of %d %ss (%.0f%%), %s; left: about %s",
            *(self.what, self.done, self.total, self.unit, 100 * share, duration(self.seconds), duration(left)),
        )


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as a reader takes them in."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
