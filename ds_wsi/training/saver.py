"""Writes checkpoints beside training: a thread, and at most two checkpoints on the way to the disk.

Who saves copies its state to the host and goes on; the thread writes the copy. Nothing here speaks to other processes:
collectives belong to the step.
"""

import queue
import threading
import time
from collections.abc import Callable

from ds_wsi.runtime.log import logger

ON_THE_WAY = 2  # copies that wait or are written; who wants to make a third waits
TELL_S = 30.0  # of waiting for the disk, after which it is told, and again
GRACE_S = 20.0  # that a checkpoint on its way waits for other processes' parts when the run ends by an error


class Saver:
    """A process's writer.

    Args:
        beside: False writes before the training goes on.

    Attributes:
        ending: set when the run ends by an error: other processes may be gone.
    """

    def __init__(self, beside: bool = True) -> None:
        self.beside = beside
        self.ending = threading.Event()
        self._room = threading.Semaphore(ON_THE_WAY)
        self._jobs: queue.SimpleQueue[tuple[str, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._under_way: tuple[str, float] | None = None  # what is written, and since when

    def __enter__(self) -> "Saver":
        """Nothing is on the way."""
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        """Wait until all is written; where the run ends by an error, a failure here is told beside it."""
        if kind is None:
            self.close()
            return
        self.ending.set()
        self._end()
        if self._failure is not None:
            logger.warning("a checkpoint was not written: %s", self._failure)

    def make_room(self) -> None:
        """Wait until there is room for one more copy.

        Raises:
            Exception: an earlier write failed; see `check`.
        """
        while not self._room.acquire(timeout=TELL_S):
            self._tell_waiting()
        try:
            self.check()
        except BaseException:
            self._room.release()
            raise

    def leave_room(self) -> None:
        """Give back the room of a copy that was not made."""
        self._room.release()

    def give(self, what: str, job: Callable[[], None]) -> None:
        """Have `job` run, beside or now; there must be room for it.

        Args:
            what: named where it fails.
            job: writes; must not call collectives.
        """
        if not self.beside:
            self._run(what, job)
            self.check()
            return
        if self._thread is None:
            # A daemon: a process that ends without `__exit__` is being killed, and does not wait for a disk.
            self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
            self._thread.start()
        self._jobs.put((what, job))

    def check(self) -> None:
        """Raise the first failure, as soon as it is known.

        Raises:
            Exception: of the write, with a note of which.
        """
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Wait until all is written, then as `check`. More can be given after it."""
        self._end()
        self.check()

    def _end(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            while self._thread.is_alive():
                self._thread.join(TELL_S)
                if self._thread.is_alive():
                    self._tell_waiting()
            self._thread = None

    def _tell_waiting(self) -> None:
        """A disk that does not answer is waited for, but not in silence."""
        under_way = self._under_way
        if under_way is not None:
            what, since = under_way
            logger.warning(
                "%s has been written for %.0f s, and is waited for. HINT: check the disk of --output_dir; a second "
                "Ctrl-C leaves without.",
                *(what, time.monotonic() - since),
            )

    def _work(self) -> None:
        while (given := self._jobs.get()) is not None:
            self._run(*given)

    def _run(self, what: str, job: Callable[[], None]) -> None:
        self._under_way = what, time.monotonic()
        try:
            job()
        except Exception as error:
            error.add_note(what)
            self._failure = self._failure or error
        finally:
            self._under_way = None
            self._room.release()


class Patience:
    """How long a part of another process is waited for.

    Args:
        seconds: the most that it waits; fewer when the run ends by an error.
        ending: see `Saver`.
    """

    def __init__(self, seconds: float, ending: threading.Event) -> None:
        self._until, self._ending = time.monotonic() + seconds, ending
        self._seen_ending = False

    def is_over(self, pause_s: float = 0.01) -> bool:
        """Whether to give up; waits a moment where not."""
        if self._ending.is_set() and not self._seen_ending:
            self._seen_ending = True
            self._until = min(self._until, time.monotonic() + GRACE_S)
        if time.monotonic() >= self._until:
            return True
        time.sleep(pause_s)
        return False
