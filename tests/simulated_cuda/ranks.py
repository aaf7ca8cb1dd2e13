"""Several ranks on simulated devices: gloo in NCCL's place."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch.distributed as dist


def put_gloo_in_place_of_nccl() -> None:
    """Make every process group of this process one of gloo, whatever backend is asked for."""
    for name in ("init_process_group", "new_group"):
        gloo = _with_gloo(getattr(dist, name))
        for module in (dist, dist.distributed_c10d):
            setattr(module, name, gloo)


def _with_gloo(make: Callable[..., Any]) -> Callable[..., Any]:
    first = make.__name__ == "init_process_group"

    @wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        if first and args:
            args = args[1:]  # the backend
        kwargs.pop("device_id", None)  # binds NCCL's communicator
        return make(*args, **{**kwargs, "backend": "gloo"})

    return made
