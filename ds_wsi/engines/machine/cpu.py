"""What DeepSpeed and Accelerate need on a machine without a GPU, in one place.

Each entry says what happens without it. All are no-ops where there is a GPU.
"""

import os
import socket
from typing import Any

import torch


def without_gpu() -> bool:
    """Whether this process has no CUDA device."""
    return not torch.cuda.is_available()


def skip_shm_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives (a minute, and a compiler), which gloo replaces."""
    if without_gpu():
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def set_single_process_variables() -> None:
    """Name this process the only rank where no launcher did; DeepSpeed otherwise asks for mpi4py."""
    if "RANK" in os.environ:
        return
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        LOCAL_SIZE="1",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )


def free_port() -> int:
    """A port of this machine that nobody listens on, so that two runs on it do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def trainer_arguments(*, deepspeed: bool = False) -> dict[str, Any]:
    """What `TrainingArguments` must be given on a machine without a GPU; call it before they are made.

    Without it Accelerate looks for oneCCL or MPI and believes in one process, and under DeepSpeed does not find that
    it is there. Empty where there is a GPU.
    """
    if not without_gpu():
        return {}
    if not deepspeed:
        return {"use_cpu": True, **({"ddp_backend": "gloo"} if "LOCAL_RANK" in os.environ else {})}
    from accelerate import PartialState

    set_single_process_variables()
    skip_shm_op()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    return {"accelerator_config": {"use_configured_state": True}}
