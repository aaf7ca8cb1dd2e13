"""How far a long command is: a bar with the time left, or lines where standard error is no terminal."""

import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

from ds_wsi.runtime.log import logger

LINE_EVERY = 0.1  # of the whole
QUIET_SECONDS = 5.0  # what takes less needs no lines
T = TypeVar("T")


class Progress:
    """Counts what is done; usable from several threads.

    Args:
        what: is being done, such as "tiling".
        unit: the noun of what is counted.
        total: how many there are; it may be told with the first `step`.
        initial: how many are done already.
        shown: False counts without a bar and without lines.
        leave: the bar stays when all is done.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        total: int | None = None,
        *,
        initial: int = 0,
        shown: bool = True,
        leave: bool = False,
    ) -> None:
        self.what, self.unit, self.total, self.shown, self.leave = what, unit, total, shown, leave
        self.done = self._initial = initial
        self._started = time.monotonic()
        self._told = initial / total if total else 0.0
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
        """The seconds since the start."""
        return time.monotonic() - self._started

    def step(self, total: int | None = None, n: int = 1, words: str = "") -> None:
        """`n` more are done, of `total`; `words` stand at the end of the bar or the line."""
        with self._lock:
            self.total = total or self.total
            self.done += n
            if not self.shown:
                return
            if sys.stderr.isatty():
                if self._bar is None:
                    self._bar = tqdm(
                        total=self.total,
                        initial=self._initial,
                        desc=self.what,
                        unit=self.unit,
                        leave=self.leave,
                        mininterval=0.5,
                    )
                self._bar.set_postfix_str(words, refresh=False)  # with the bar's own update
                self._bar.update(n)
            elif self.total and self.seconds > QUIET_SECONDS:
                self._tell_line(self.done / self.total, words)

    def over(self, values: Iterable[T]) -> Iterator[T]:
        """The values, one step each."""
        with self:
            for value in values:
                yield value
                self.step()

    def _tell_line(self, share: float, words: str) -> None:
        if share < 1 and share < self._told + LINE_EVERY:
            return
        self._told = share
        here = max(share - self._initial / (self.total or 1), 1e-9)
        left = self.seconds * (1 - share) / here
        logger.info(
            "%s: %d of %d %ss (%.0f%%), %s; left: about %s%s",
            *(self.what, self.done, self.total, self.unit, 100 * share, duration(self.seconds), duration(left)),
            f"; {words}" if words else "",
        )


class PresentRate:
    """How much is done a second now: of the last half minute or so, which start and planning do not slow.

    The first step, with what is done once, does not count.
    """

    SECONDS = 30.0

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque()
        self._amount = 0  # of all of them

    def after(self, amount: int) -> float:
        """The rate after one more step of this amount."""
        now = time.monotonic()
        self._steps.append((now, amount))
        self._amount += amount
        while len(self._steps) > 2 and now - self._steps[1][0] > self.SECONDS:
            self._amount -= self._steps.popleft()[1]
        first, of_first = self._steps[0]
        done = self._amount - of_first
        return done / (now - first) if now > first else 0.0


def duration(seconds: float, digits: int = 0) -> str:
    """Seconds, with so many digits after the point, minutes or hours, as a reader takes them in."""
    if seconds < 60:
        return f"{seconds:.{digits}f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
