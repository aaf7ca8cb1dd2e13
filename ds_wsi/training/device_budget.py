"""What of a GPU a partition may plan with: what is free when it is planned, less what takes memory only later."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.engines.accelerator.engine import Accelerator
from ds_wsi.partition import PartitionPolicy
from ds_wsi.partition.planning.plan import gib
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.memory import free_bytes
from ds_wsi.training.settings import TrainSettings

OF_FREE = 0.9  # as `plan_partition` takes where no budget is given: the allocator rounds up
WITH_VALIDATION = 0.8  # of that, where another process validates on the same GPU
_ADAM_BYTES = 8  # two moments of each parameter, in float32
_COPY_BYTES = 4  # a float32 copy of each parameter: an engine's of half-precision weights, or a moving average


@dataclass(frozen=True)
class EngineMemory:
    """What an engine keeps on a rank's device, beside a plain module's parameters and gradients.

    Attributes:
        state_parts, weight_parts: ranks over which it shards the optimizer's state, and the parameters.
        offloads: whether the optimizer's state is in host memory.
        buckets: whether gradients are held a second time, to be summed over ranks or sharded.
        copies: whether the optimizer steps on copies in float32 of half-precision weights.
    """

    state_parts: int = 1
    weight_parts: int = 1
    offloads: bool = False
    buckets: bool = False
    copies: bool = False

    @classmethod
    def of(cls, accelerator: Accelerator) -> "EngineMemory":
        """The memory of the engine that the accelerator was built for."""
        ranks, plugin = accelerator.num_processes, accelerator.state.deepspeed_plugin
        if plugin is None:
            parts = ranks if accelerator.is_fsdp2 else 1
            return cls(parts, parts, buckets=ranks > 1)
        zero: dict[str, Any] = plugin.deepspeed_config.get("zero_optimization", {})
        stage = int(zero.get("stage", 0))
        return cls(
            state_parts=ranks if stage >= 1 else 1,
            weight_parts=ranks if stage >= 3 else 1,
            offloads=(zero.get("offload_optimizer") or {}).get("device") not in (None, "none"),
            buckets=True,
            copies=accelerator.mixed_precision in ("fp16", "bf16"),
        )


def later_bytes(module: nn.Module, encoder: nn.Module, engine: EngineMemory, *, averages: bool) -> int:
    """What the training takes of a device between the plan and a step's activations.

    That is weights that are not there yet, the optimizer's state, and gradients, of which a plan counts the encoder's.

    Args:
        module: the whole model.
        encoder: the model's encoder.
        engine: the memory of the engine that will wrap the model.
        averages: whether a moving average of the weights is kept.
    """
    parameters = list(module.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    planned = {id(parameter) for parameter in encoder.parameters()}
    count = sum(map(_elements, trained))
    absent = _bytes(part for part in (*parameters, *module.buffers()) if part.device.type != "cuda")
    gradients = _bytes(part for part in trained if id(part) not in planned)
    if engine.buckets:
        gradients += _bytes(trained)
    state = 0 if engine.offloads else count * (_ADAM_BYTES + (_COPY_BYTES if engine.copies else 0))
    average = _COPY_BYTES * sum(map(_elements, parameters)) if averages else 0
    return absent // engine.weight_parts + gradients + state // engine.state_parts + average


def with_budget(
    policy: PartitionPolicy,
    module: Any,
    settings: TrainSettings,
    accelerator: Accelerator,
    *,
    validates: bool,
) -> PartitionPolicy:
    """The policy with the run's budget of the GPU, where none is given; on a CPU as it is.

    It is decided once, because later the run's own memory would count as taken.

    Args:
        policy: the partition's.
        module: the SlideModel, before the engine has it.
        settings, accelerator: the run's.
        validates: whether there is a split to validate on.
    """
    device = accelerator.device
    if device.type != "cuda" or policy.gpu_budget_bytes is not None:
        return policy
    free = free_bytes(device)
    later = later_bytes(module, module.encoder, EngineMemory.of(accelerator), averages=settings.optim.ema_decay > 0)
    beside = validates and _validates_on(device, settings, main=accelerator.is_main_process)
    budget = max(1, int(OF_FREE * (WITH_VALIDATION if beside else 1.0) * (free - later)))
    words = ", and a fifth for the validation beside (--validate_beside)" if beside else ""
    logger.info(
        "partition: %s of the %s that are free on %s: %s are for weights, gradients and the optimizer's state%s",
        *(gib(budget), gib(free), device, gib(later), words),
    )
    return replace(policy, gpu_budget_bytes=budget)


def _validates_on(device: torch.device, settings: TrainSettings, *, main: bool) -> bool:
    """Whether the process that validates beside training does it on this rank's device."""
    if not settings.run.validate_beside:
        return False
    if settings.run.validation_device is None:
        return main
    there = torch.device(settings.run.validation_device)
    return there.type == device.type and (there.index or 0) == (device.index or 0)


def _elements(tensor: Tensor) -> int:
    """How many the whole tensor has, also where ZeRO-3 has left this rank a part."""
    return int(getattr(tensor, "ds_numel", tensor.numel()))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(_elements(tensor) * tensor.element_size() for tensor in tensors)
