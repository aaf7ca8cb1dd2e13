"""DeepSpeed compiles its ops at first use: which of them can be here, and what is taken in the place of the others."""

import shutil
from typing import Any

import torch

from ds_wsi.engines.machine.cpu import without_gpu
from ds_wsi.runtime.log import logger

COMPILER = "g++ and ninja"


def choose_adam(config: dict[str, Any]) -> None:
    """Take torch's Adam where DeepSpeed's own would be compiled in vain, in place in `config`, and say why.

    Without a GPU no op is worth its minutes. On one, FusedAdam takes nvcc of the CUDA version that torch was built
    with, and CPUAdam (an optimizer that is offloaded) a C++ compiler. Where `torch_adam` is given, it stays.
    """
    zero = config.get("zero_optimization") or {}
    offloads = (zero.get("offload_optimizer") or {}).get("device") not in (None, "none")
    optimizer = config.get("optimizer") or {}
    is_adam = optimizer.get("type", "").lower() in ("adam", "adamw")
    if is_adam and "torch_adam" in optimizer.get("params", {}):
        reason: str | None = None
    elif without_gpu():
        reason = "no GPU"
    elif offloads and (is_adam or not optimizer):  # Accelerate puts CPUAdam in the place of torch's own
        reason = cpu_adam_lacks()
    else:
        reason = cuda_op_lacks("fused_adam") if is_adam else None
    if without_gpu() or (offloads and reason):
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    if reason is None:
        return
    if is_adam:
        optimizer.setdefault("params", {})["torch_adam"] = True
    if without_gpu():
        logger.info("no GPU: torch's Adam, so that no DeepSpeed op is compiled")
    elif offloads:
        logger.warning(
            "torch's Adam takes the steps on the CPU, slower than DeepSpeed's CPUAdam, which cannot be built: %s. "
            "HINT: install %s.",
            *(reason, COMPILER),
        )
    else:
        logger.info("torch's Adam in the place of DeepSpeed's FusedAdam, which cannot be built: %s", reason)


def cpu_adam_lacks() -> str | None:
    """Why CPUAdam cannot be built here; None where it can: then it is, for a minute or two at first use."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    if is_installed("cpu_adam"):
        return None
    lacks = compiler_lacks()
    if lacks is not None:
        return lacks
    try:
        CPUAdamBuilder().load(verbose=False)
    except Exception as error:
        return _first_line(error)
    return None


def cuda_op_lacks(name: str) -> str | None:
    """Why an op of CUDA code cannot be built here; None where it can, as far as can be told without building it."""
    if is_installed(name) or torch.version.hip is not None:
        return None
    return compiler_lacks() or toolkit_lacks()


def is_installed(name: str) -> bool:
    """Whether DeepSpeed was installed with this op compiled (DS_BUILD_...)."""
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get(name, False))


def compiler_lacks() -> str | None:
    """What of a C++ compiler is missing; None: nothing."""
    missing = [program for program in ("g++", "ninja") if shutil.which(program) is None]
    return f"no {' and no '.join(missing)} on the PATH" if missing else None


def toolkit_lacks() -> str | None:
    """Why nvcc cannot compile for this torch: missing, or of another CUDA version; None where it can."""
    from deepspeed.ops.op_builder.builder import assert_no_cuda_mismatch

    try:
        assert_no_cuda_mismatch()
    except Exception as error:
        return f"nvcc of CUDA {torch.version.cuda} is needed ({_first_line(error)})"
    return None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].strip(" >-")[:300]
