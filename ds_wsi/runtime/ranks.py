"""Which rank is to blame: a rank that dies leaves the others with a broken collective that does not say so."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_BEAT_S = 1.0
_SILENCE_S = 4.0  # without a beat: a rank that computes still beats, from a thread of its own
_PREFIX = "ds_wsi/ranks"


class RankFailureError(RuntimeError):
    """Another rank failed, died, or does not take part."""


@contextmanager
def watch_ranks() -> Iterator[None]:
    """Name the rank that made a collective fail, in the error of every other rank.

    Each rank shows a beat in the process group's store, and what it died of. Around a whole run: what fails inside of
    it because a peer is gone raises a `RankFailureError` with the peer's number and reason. Nothing without peers.

    Raises:
        RankFailureError: a collective failed; from the original error.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    store: Any = dist.distributed_c10d._get_default_store()
    rank, world = dist.get_rank(), dist.get_world_size()
    done = threading.Event()

    def beat() -> None:
        count = 0
        while not done.wait(_BEAT_S):
            count += 1
            try:
                store.set(f"{_PREFIX}/beat/{rank}", str(count))
            except Exception:  # the store is gone with its owner: the collective's own error tells
                return

    threading.Thread(target=beat, name="ds_wsi-beat", daemon=True).start()
    try:
        yield
    except Exception as error:
        if not _is_of_communication(error):
            _tell(store, rank, error)
            raise
        raise RankFailureError(_accusation(store, rank, world, error)) from error
    finally:
        done.set()


def _is_of_communication(error: BaseException) -> bool:
    text = str(error)
    known = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in text for word in known)


def _tell(store: Any, rank: int, error: BaseException) -> None:
    reason = f"{type(error).__name__}: {error}".splitlines()[0][:500]
    try:
        store.set(f"{_PREFIX}/failed/{rank}", reason)
    except Exception:  # the error itself is raised next
        return


def _accusation(store: Any, rank: int, world: int, error: BaseException) -> str:
    first_line = str(error).splitlines()[0]
    try:
        store.set_timeout(timedelta(seconds=10))
        before = _beats(store, world)
        time.sleep(_SILENCE_S)
        after = _beats(store, world)
        told = {other: _read(store, f"{_PREFIX}/failed/{other}") for other in range(world)}
    except Exception as gone:
        return (
            f"the ranks lost each other, and the process that keeps their addresses (rank 0, or the launcher) is gone "
            f"({gone!s:.100}), seen by rank {rank}/{world}: {first_line}"
        )
    failed = [f"rank {other}/{world} failed ({reason})" for other, reason in told.items() if reason]
    silent = [
        f"rank {other}/{world} died without a word (killed, or out of memory?)"
        for other in range(world)
        if other != rank and not told[other] and before[other] == after[other]
    ]
    blamed = failed + silent
    if not blamed:
        return (
            f"all {world} ranks live, but did not meet in a collective, seen by rank {rank}/{world}: {first_line}. "
            "HINT: one is much slower (raise --ddp_timeout), or they run different code or settings."
        )
    return f"{'; '.join(blamed)}, seen by rank {rank}/{world}: {first_line}"


def _beats(store: Any, world: int) -> list[str]:
    return [_read(store, f"{_PREFIX}/beat/{other}") for other in range(world)]


def _read(store: Any, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
