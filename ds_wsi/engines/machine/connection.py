"""A process group after another one, in the same processes.

A launcher's processes meet in its store, or in that of rank 0. There the addresses of their first group stay: a process
that formed the second group under the same names would read the first one's, where nobody answers, and wait for ever.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ds_wsi.runtime.seams import default_store


@dataclass
class _Connection:
    """How the processes met first.

    Attributes:
        store: the first group's store, which is held: of one that rank 0 keeps, the end would be every rank's.
        backend: the first group's.
        rank, world_size: this process's, and how many there are.
        n_groups: how many groups of ours were formed.
    """

    store: Any
    backend: str
    rank: int
    world_size: int
    n_groups: int = 1


_first: _Connection | None = None


def connect_again(timeout: timedelta) -> None:
    """Form a group where an earlier one of ours is gone, as that was formed, under names of its own.

    Nothing is done before the first, where that was of one process, and where there is a group.
    Collective: every process that formed the first one calls it as often.

    Args:
        timeout: how long a collective waits for the other ranks.
    """
    if _first is None or _first.world_size == 1 or dist.is_initialized():
        return
    _first.store.set_timeout(timeout)
    dist.init_process_group(
        _first.backend,
        store=dist.PrefixStore(f"ds_wsi/group {_first.n_groups}", _first.store),
        rank=_first.rank,
        world_size=_first.world_size,
        timeout=timeout,
    )
    _first.n_groups += 1


def disconnect() -> None:
    """Destroy the process group; `connect_again` forms the next."""
    global _first
    if _first is None:
        backend = dist.get_backend()
        if backend == "undefined":  # torch's word for one backend per kind of device
            backend = dist.get_backend_config()
        _first = _Connection(default_store(), backend, dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()
