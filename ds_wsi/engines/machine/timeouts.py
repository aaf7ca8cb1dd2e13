"""One timeout for every process group: that of the run, whoever makes the group.

DeepSpeed clones the world's group, and meshes make groups for their dimensions, without a timeout: torch then gives
them its own default of 10 or 30 minutes, whatever the world's group was given.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ds_wsi.runtime.seams import check_seams

_C10D: Any = dist.distributed_c10d
_DEFAULTS = ("default_pg_timeout", "default_pg_nccl_timeout")  # read whenever a group is made without a timeout


def set_timeouts(timeout: timedelta) -> None:
    """Give the timeout to all process groups that there are, and to those that are made without one from now on."""
    check_seams("torch", "timeouts")
    for name in _DEFAULTS:
        setattr(_C10D, name, timeout)
    if dist.is_initialized():
        # The older name is deprecated where there is the newer one.
        set_timeout = getattr(dist, "set_timeout", None) or _C10D._set_pg_timeout
        for group in list(_C10D._world.pg_map):
            set_timeout(timeout, group)


@contextmanager
def restoring_timeouts() -> Iterator[None]:
    """When the block is left, groups that are then made without a timeout have the one that they had before it."""
    check_seams("torch", "timeouts")
    before = {name: getattr(_C10D, name) for name in _DEFAULTS}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(_C10D, name, value)


@contextmanager
def following_world() -> Iterator[None]:
    """Groups that are made inside without a timeout have the world group's; as before where there is no such group."""
    with restoring_timeouts():
        if dist.is_initialized():
            for name in _DEFAULTS:
                setattr(_C10D, name, group_timeout(dist.group.WORLD))
        yield


def group_timeout(group: Any) -> timedelta:
    """The time that a collective of a group waits for the other ranks."""
    backend = group._get_backend(torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu"))
    timeout: timedelta = backend.options._timeout
    return timeout
