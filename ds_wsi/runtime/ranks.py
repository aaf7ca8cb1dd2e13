"""The rank to blame: one that dies leaves the others with a broken collective that does not say so.

Each rank shows a beat in the process group's store, from a thread of its own, and the same thread watches the others'
beats. Under gloo a collective fails with an exception, which `watch_ranks` turns into one that names the rank. Under
NCCL it never ends, and torch ends the process at last, without an exception of Python's: there the thread's line in the
log is what names the rank.
"""

import os
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ds_wsi.runtime.log import logger
from ds_wsi.runtime.processes import GONE, state_of, state_words
from ds_wsi.runtime.seams import default_store
from ds_wsi.runtime.signals import Stopped

_BEAT_S = 1.0
_SILENCE_S = 4.0  # without a beat: a rank that computes still beats
_ANSWER_S = 15.0  # of the store
_LOST = 6  # looks, one a beat, after which it is told unasked: an interpreter can be held for a while (a large pickle)
_PREFIX = "ds_wsi/ranks"
_LEFT = "left"  # the last word of a rank that has come to the end
_FAILED = "failed "


class RankFailureError(RuntimeError):
    """Another rank failed, died, or does not take part."""


@contextmanager
def watch_ranks() -> Iterator[None]:
    """Name the rank that made a collective fail, in the error of every other rank, and in its log.

    Around a whole run, from its preparation on: what fails inside of it because a peer is gone raises a
    `RankFailureError` with the peer's number and reason. Nothing without peers.

    Raises:
        RankFailureError: a collective failed; from the original error.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    store = default_store()
    watch = RankWatch(store, dist.get_rank(), dist.get_world_size())
    watch.start()
    last_word = _LEFT
    try:
        yield
    except BaseException as error:  # one that was interrupted leaves the others waiting too
        if isinstance(error, Stopped) and error.together:
            raise
        if not _is_of_communication(error):
            last_word = f"{_FAILED}{type(error).__name__}: {error}".splitlines()[0][:500]
            raise
        raise RankFailureError(watch.accusation(error)) from error
    finally:
        watch.end(last_word)


class RankWatch:
    """This rank's beat, and what it sees of the others'.

    Args:
        store: the process group's store.
        rank, world: this process's rank, and how many there are.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        # Connections of its own: a store serves one call at a time, and the main thread may wait in one for minutes.
        # Both now: once the store's owner is gone, a new one would be tried for until the timeout.
        self.store, self._asking = store.clone(), store.clone()
        self._asking.set_timeout(timedelta(seconds=10))
        self.rank, self.world = rank, world
        self._done = threading.Event()
        self._seen: dict[int, tuple[str, int]] = {}  # what each rank last said, and how many looks found the same
        self._thread = threading.Thread(target=self._run, name="ds_wsi-beat", daemon=True)

    def start(self) -> None:
        """Begin to beat and to watch."""
        self._thread.start()

    def end(self, last_word: str) -> None:
        """Stop, and leave a word to the others: "left", or "failed" and the reason."""
        self._done.set()
        self._thread.join(_SILENCE_S)
        if self._thread.is_alive():  # the store does not answer
            return
        try:
            self.store.set(self._key(self.rank), last_word)
        except Exception:  # the store is gone with its owner: whatever ended this rank tells
            return
        if last_word != _LEFT:
            time.sleep(2 * _BEAT_S)  # the others look; the store, or they, may end with this process

    def look(self) -> list[str]:
        """One sentence for each rank that is gone, when it is first found so. Called once a beat.

        Counted in looks and not in seconds: where all ranks of a machine were held up together, nobody is missed.
        """
        accusations = []
        for other, word in self._words(self.store).items():
            before, times = self._seen.get(other, ("", 0))
            times = times + 1 if word == before else 0
            self._seen[other] = word, times
            if word.startswith(_FAILED) and times == 0:
                accusations.append(self._failed(other, word))
            elif times == _LOST and not word.startswith((_FAILED, _LEFT)):
                accusations.append(f"{self._died(other, word)}: no sign of it for {_LOST * _BEAT_S:.0f} s")
        return accusations

    def accusation(self, error: BaseException) -> str:
        """Say whose fault it is that a collective failed with this error; takes some seconds."""
        first_line = str(error).splitlines()[0]
        seen_by = f"seen by rank {self.rank}/{self.world}: {first_line}"
        try:
            before = after = self._ask()
            told = any(word.startswith(_FAILED) for word in before.values())
            if not told:  # else the store may end with the rank that failed, meanwhile
                time.sleep(_SILENCE_S)  # the thread goes on: this rank lives
                after = self._ask()
        except Exception as gone:
            return (
                "the ranks lost each other, and the process that keeps their addresses (rank 0, or the launcher) is "
                f"gone ({gone!s:.100}), {seen_by}"
            )
        failed = [self._failed(other, word) for other, word in after.items() if word.startswith(_FAILED)]
        silent = [
            self._died(other, after.get(other, ""))
            for other in range(self.world)
            if not told
            and other != self.rank
            and before.get(other) == after.get(other)
            and not after.get(other, "").startswith((_FAILED, _LEFT))
        ]
        blamed = failed + silent
        if not blamed:
            return (
                f"all {self.world} ranks live, but did not meet in a collective, {seen_by}. "
                "HINT: one is much slower (raise --ddp_timeout), or they run different code or settings."
            )
        return f"{'; '.join(blamed)}, {seen_by}"

    def _ask(self) -> dict[int, str]:
        """Call `_words` in a thread: a store whose process is stopped does not answer, past torch's own timeout."""
        answers: queue.SimpleQueue[dict[int, str] | Exception] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(self._words(self._asking))
            except Exception as error:
                answers.put(error)

        threading.Thread(target=ask, name="ds_wsi-ask", daemon=True).start()
        try:
            answer = answers.get(timeout=_ANSWER_S)
        except queue.Empty:
            raise TimeoutError(f"stopped, or no answer within {_ANSWER_S:.0f} s") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _run(self) -> None:
        count = 0
        while count == 0 or not self._done.wait(_BEAT_S):  # at once: of an earlier run the store may say "left"
            count += 1
            try:
                self.store.set(self._key(self.rank), self._beat(count))
                gone = self.look()
            except Exception as error:
                gone = [
                    f"the process that keeps the ranks' addresses (rank 0, or the launcher) is gone ({error!s:.100})"
                ]
                self._done.set()
            for sentence in gone:
                logger.error("%s, seen by rank %d/%d; the next collective cannot end", sentence, self.rank, self.world)

    def _words(self, store: Any) -> dict[int, str]:
        """What every other rank that has begun said last: one call to the store for all."""
        others = [other for other in range(self.world) if other != self.rank]
        # To read what is not there would wait; what is there once stays.
        begun = [other for other in others if other in self._seen or store.check([self._key(other)])]
        words = store.multi_get([self._key(other) for other in begun]) if begun else []
        return {other: word.decode() for other, word in zip(begun, words, strict=True)}

    def _failed(self, other: int, word: str) -> str:
        return f"rank {other}/{self.world} failed ({word.removeprefix(_FAILED)})"

    def _died(self, other: int, word: str) -> str:
        """What became of a rank that no longer beats: where it is a process of this machine, the system tells."""
        _, _, process = word.partition(" ")
        host, _, pid = process.rpartition(" ")
        state = state_of(int(pid)) if host == socket.gethostname() and pid.isdigit() else GONE
        if state == GONE:
            return f"rank {other}/{self.world} died without a word (killed, or out of memory?)"
        return f"rank {other}/{self.world} does not go on (pid {pid}: {state_words(state)})"

    @staticmethod
    def _beat(count: int) -> str:
        return f"{count} {socket.gethostname()} {os.getpid()}"

    @staticmethod
    def _key(rank: int) -> str:
        return f"{_PREFIX}/{rank}"


def _is_of_communication(error: BaseException) -> bool:
    text = str(error)
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    if isinstance(error, dist.DistError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    # A store of files only says "Wait timeout", where a group is made and a rank does not come.
    return any(word in text for word in signs) or ("timeout" in text.lower() and _is_raised_by_torchs(error))


def _is_raised_by_torchs(error: BaseException) -> bool:
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and "/torch/distributed/" in at.tb_frame.f_code.co_filename
