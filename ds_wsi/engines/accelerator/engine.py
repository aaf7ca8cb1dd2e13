"""Accelerate under every launcher: deepspeed, accelerate launch, torchrun, plain python; with and without a GPU."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DummyOptim,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ds_wsi.compression.comm import CommPolicy
from ds_wsi.engines.accelerator.groups import trained_parameters
from ds_wsi.engines.comm_hooks.register import CommHandle, attach
from ds_wsi.engines.deepspeed_json.auto import fill_rest
from ds_wsi.engines.deepspeed_json.config import fill_auto, suit_machine
from ds_wsi.engines.machine import cpu
from ds_wsi.engines.machine.connection import connect_again
from ds_wsi.engines.machine.timeouts import set_timeouts
from ds_wsi.engines.sharded.fsdp import build_with_fsdp, fsdp_plugin, is_fsdp2, launched_with_fsdp, shard_model
from ds_wsi.engines.sharded.zero import gather_as_one
from ds_wsi.norms.roles import population_group
from ds_wsi.runtime.choices import OPTIMIZERS, precision_words
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.seams import check_seams

__all__ = [
    "Accelerator",
    "CommHandle",
    "EngineSettings",
    "attach_hook",
    "average_buffers",
    "broadcast_object_list",
    "build_accelerator",
    "gather_object",
    "pool_statistics",
    "prepare",
    "take_steps_whole",
]


@dataclass(frozen=True)
class EngineSettings:
    """What an engine has to know of the run.

    Args:
        learning_rate, weight_decay, max_grad_norm: the optimizer's; max_grad_norm 0 clips nothing.
        optimizer: a key of `OPTIMIZERS`; the DeepSpeed JSON's own section, where it has one, decides.
        bags_per_rank: slides per rank and micro-step.
        accumulation: micro-steps per optimizer step.
        mixed_precision: "no", "bf16" or "fp16".
        timeout_s: seconds that a collective waits for the other ranks.
        fsdp: shard the model with FSDP2, as under `accelerate launch --use_fsdp` without it.
        momentum: the momentum of "sgd".
    """

    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    optimizer: str
    bags_per_rank: int
    accumulation: int
    mixed_precision: str = "no"
    timeout_s: int = 1800
    fsdp: bool = False
    momentum: float = 0.0


_ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
# The option that gives a key of the DeepSpeed JSON its value, where the JSON says "auto".
OPTION_OF = {
    "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "gradient_clipping": "--max_grad_norm",
    "optimizer.params.lr": "--learning_rate",
    "optimizer.params.weight_decay": "--weight_decay",
    "optimizer.params.momentum": "--momentum",
}


def build_accelerator(
    settings: EngineSettings, output_dir: Path, deepspeed_config: dict[str, Any] | None
) -> Accelerator:
    """Start the process group as the launcher described it and return the Accelerator that drives the run.

    Args:
        settings: the engine's settings.
        output_dir: TensorBoard's logs go below it.
        deepspeed_config: the JSON, or None for DDP or one process; under `accelerate launch --use_deepspeed` the
            launcher's own configuration is used where this is None.

    Raises:
        ValueError: the JSON contradicts the settings; FSDP2 beside DeepSpeed, or in one process.
    """
    plugin = _deepspeed_plugin(settings, deepspeed_config)
    timeout = timedelta(seconds=settings.timeout_s)
    set_timeouts(timeout)  # of a group that is there already, and of those that the engine makes
    connect_again(timeout)
    # DDP would copy rank 0's running statistics over every other rank's at each forward.
    of_ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    handlers: list[Any] = [InitProcessGroupKwargs(timeout=timeout), of_ddp]
    if cpu.without_gpu() and "LOCAL_RANK" in os.environ:
        # Accelerate would look for oneCCL or MPI, and without them believe in one process.
        handlers = [InitProcessGroupKwargs(backend="gloo", timeout=timeout), of_ddp]
    keywords: dict[str, Any] = {
        "cpu": cpu.without_gpu() and plugin is None,
        # DeepSpeed's own autocast otherwise: see _use_autocast.
        "mixed_precision": settings.mixed_precision if plugin is None else "no",
        "gradient_accumulation_steps": settings.accumulation,
        "log_with": "tensorboard",
        "project_config": ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir)),
        "kwargs_handlers": handlers,
    }
    if settings.fsdp or launched_with_fsdp():
        if plugin is not None:
            raise ValueError("FSDP2 must not be used with DeepSpeed, got both. HINT: leave out one; ZeRO-3 shards too.")
        return build_with_fsdp(fsdp_plugin(), **keywords)
    return Accelerator(deepspeed_plugin=plugin, **keywords)


def _deepspeed_plugin(settings: EngineSettings, config: dict[str, Any] | None) -> DeepSpeedPlugin | None:
    if config is None and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        if os.environ.get(_ACCUMULATION) in ("1", "auto"):
            # The launcher's default, which would take the place of the script's own option.
            del os.environ[_ACCUMULATION]
        config = dict(DeepSpeedPlugin().deepspeed_config)  # from the launcher's variables
        # All of them are in it now; Accelerate refuses those of a --config_file beside a whole configuration.
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    if config is None:
        return None
    if "scheduler" in config:
        raise ValueError(
            "scheduler of the DeepSpeed config must be absent, got one. HINT: --lr_scheduler_type sets the schedule."
        )
    section = config.get("optimizer") or {}
    if settings.momentum and section and str(section.get("type", "")).lower() != "sgd":
        raise ValueError(
            f"--momentum must be given with SGD, got {settings.momentum} and optimizer.type {section.get('type')} of "
            'the DeepSpeed config. HINT: "type": "SGD", or leave the section out and give --optim sgd.'
        )
    cpu.set_single_process_variables()
    cpu.skip_shm_op()
    world_size = int(os.environ["WORLD_SIZE"])
    values = {
        "train_micro_batch_size_per_gpu": settings.bags_per_rank,
        "gradient_accumulation_steps": settings.accumulation,
        "train_batch_size": settings.bags_per_rank * settings.accumulation * world_size,
        "gradient_clipping": settings.max_grad_norm,
        "optimizer.params.lr": settings.learning_rate,
        "optimizer.params.weight_decay": settings.weight_decay,
    }
    if settings.momentum or section.get("params", {}).get("momentum") == "auto":
        values["optimizer.params.momentum"] = settings.momentum
    # Accelerate looks for values of its own wherever it reads "auto", and ours has a mode of that name.
    filled = fill_auto({key: value for key, value in config.items() if key != "ds_wsi"}, values, OPTION_OF)
    _use_autocast(filled, settings.mixed_precision)
    filled = fill_rest(filled)
    suit_machine(filled)
    return DeepSpeedPlugin(hf_ds_config=filled)


def _use_autocast(config: dict[str, Any], precision: str) -> None:
    """Mixed precision by DeepSpeed's torch_autocast, in place.

    Its "bf16" and "fp16" sections halve the parameters and leave the buffers: BatchNorm, with halved weights and
    float32 running statistics, then fails, and halved statistics would stop following the bags. So what they enable is
    done by autocast too, and must agree with the options.

    Raises:
        ValueError: a section, or torch_autocast's dtype, that contradicts the precision.
    """
    for kind in ("bf16", "fp16"):
        section = config.get(kind)
        if section is None:
            continue
        enabled, asked = section.get("enabled", "auto"), precision == kind
        if enabled not in ("auto", asked):
            remedy = f"give --{kind}" if enabled else f"leave out --{kind}"
            raise ValueError(
                f'{kind}.enabled of the DeepSpeed config must be "auto" or the run\'s precision, {precision}, got '
                f'{json.dumps(enabled)}. HINT: {remedy}, or write "auto".'
            )
        if enabled is True:
            logger.info("%s of the DeepSpeed config: followed by torch_autocast, which BatchNorm stands", kind)
        config[kind] = {"enabled": False}
    if precision == "no":
        return
    dtype = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    given = config.setdefault("torch_autocast", {"enabled": True, "dtype": dtype})
    if given.get("enabled") is not True or given.get("dtype", "bfloat16") not in (dtype, precision):
        raise ValueError(
            f"torch_autocast of the DeepSpeed config must be of the run's precision, {precision}, got "
            f"{json.dumps(given)}. HINT: leave the section out; --{precision} writes it."
        )


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    settings: EngineSettings,
    apart: nn.Module | None = None,
    groups: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[nn.Module, Any]:
    """Wrap the model for the engine and build its optimizer over the parameters that are trained.

    Args:
        accelerator: what `build_accelerator` returned.
        model: the model to wrap.
        settings: the engine's settings.
        apart, groups: the optimizer's parameter groups, see `trained_parameters`; None has one.

    Returns:
        (model, optimizer): the DeepSpeed engine, DDP, or the module itself (sharded in place under FSDP2), and the
        optimizer whose `param_groups` hold the learning rate.
    """
    if accelerator.is_fsdp2:
        shard_model(model, accelerator)
    trained = trained_parameters(model, apart, groups)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        gather_as_one(model)
    if plugin is not None and "optimizer" in plugin.deepspeed_config:
        optimizer: Any = DummyOptim(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    else:
        # One kernel for all parameters; on a CPU torch's own choice is as fast.
        more: dict[str, Any] = {"fused": True} if accelerator.device.type == "cuda" else {}
        if settings.optimizer == "sgd":
            more["momentum"] = settings.momentum
        optimizer = getattr(torch.optim, OPTIMIZERS[settings.optimizer])(
            trained, lr=settings.learning_rate, weight_decay=settings.weight_decay, **more
        )
    if is_fsdp2(model):
        # Separately, because together Accelerate would look for the parameters by address: see fsdp.py. It has nothing
        # more to wrap ("evaluation"), but for autocast.
        model, optimizer = (
            accelerator.prepare_model(model, evaluation_mode=True),
            accelerator.prepare_optimizer(optimizer),
        )
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
    logger.info("engine: %s", describe(accelerator, settings.mixed_precision))
    return model, optimizer


def attach_hook(accelerator: Accelerator, model: nn.Module, policy: CommPolicy) -> CommHandle | None:
    """Register the policy's communication hook with what `prepare` returned; None where there is none, or one rank."""
    if policy.hook == "none":
        return None
    if accelerator.num_processes == 1:
        logger.info("communication hook %s: left out, one process has nobody to send to", policy.hook)
        return None
    scaler = accelerator.scaler
    return attach(model, policy, loss_scale=None if scaler is None else scaler.get_scale)


def take_steps_whole(accelerator: Accelerator) -> None:
    """Let every optimizer step be one micro-step of as many bags, whatever was set; before `prepare`."""
    micro_steps = accelerator.gradient_accumulation_steps
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        config = plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] *= config["gradient_accumulation_steps"]
        config["gradient_accumulation_steps"] = plugin.gradient_accumulation_steps = 1
    if micro_steps > 1:
        accelerator.gradient_accumulation_steps = 1


@torch.no_grad()
def average_buffers(accelerator: Accelerator, module: nn.Module) -> None:
    """Pool the ranks' floating buffers (BatchNorm's running statistics), the same on every rank, in place.

    Each rank tracks the bags it saw, and only rank 0's would be saved: without this, ranks evaluate different models,
    and a resumed run differs from an uninterrupted one. Means are averaged; a variance is that of all ranks' values
    together: the mean of the ranks' own, and the spread of their means. Norms that share a population already have the
    same statistics, bit for bit, and stay as they are. What is not saved is constant (the tiles' mean) and stays too: a
    mean of equal numbers may be rounded. One all-reduce for all buffers of a dtype; the identity on one rank.
    """
    averaged: list[tuple[torch.Tensor, torch.Tensor]] = []  # a buffer, and what is averaged for it
    variances: list[tuple[Any, torch.Tensor]] = []
    for tracked in tracked_buffers(accelerator, module):
        wide = tracked.buffer.detach().to(torch.promote_types(tracked.buffer.dtype, torch.float32))
        if tracked.name.rpartition(".")[2] == "running_var" and isinstance(tracked.part, _BatchNorm):
            variances.append((tracked.part, wide))
        else:
            averaged.append((tracked.buffer, wide))
    means = _mean_over_ranks(accelerator, [wide for _, wide in averaged])
    average = {id(buffer): mean for (buffer, _), mean in zip(averaged, means, strict=True)}
    spread = [
        wide + (part.running_mean.to(wide.dtype) - average[id(part.running_mean)]).square() for part, wide in variances
    ]
    for (part, _), var in zip(variances, _mean_over_ranks(accelerator, spread), strict=True):
        part.running_var.copy_(var)
    for (buffer, _), mean in zip(averaged, means, strict=True):
        buffer.copy_(mean)


class _World:
    """The processes of the default group, as `average_buffers` asks for them."""

    @property
    def num_processes(self) -> int:
        return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "mean"
        torch.distributed.all_reduce(tensor)
        return tensor / self.num_processes


@torch.no_grad()
def pool_statistics(module: nn.Module) -> None:
    """Make BatchNorm's running statistics those of all processes' bags, in place, before a model is saved or evaluated.

    In a loop of one's own each process tracks the statistics of the bags that it sees, and one of them writes the file.
    `ds-wsi train` and `SlideTrainer` do this by themselves. The identity on one process; norms over a step have the
    same statistics on all processes already. Collective.

    Args:
        module: a model, plain or as an engine or DDP holds it.
    """
    world: Any = _World()
    average_buffers(world, module)


class TrackedBuffer(NamedTuple):
    """A buffer of which each process has its own, its name in the whole module, and the part that it is of."""

    name: str
    buffer: torch.Tensor
    part: nn.Module


def tracked_buffers(accelerator: Accelerator, module: nn.Module) -> list[TrackedBuffer]:
    """The floating buffers that are saved and that processes track by themselves; none where there is one process."""
    if accelerator.num_processes == 1:
        return []
    check_seams("torch", "buffers")
    return [
        TrackedBuffer(f"{prefix}.{name}" if prefix else name, buffer, part)
        for prefix, part in module.named_modules()
        if not population_spans(part, accelerator.num_processes)
        for name, buffer in part.named_buffers(recurse=False)
        if buffer.is_floating_point() and name not in part._non_persistent_buffers_set
    ]


def population_spans(norm: nn.Module, n_ranks: int) -> bool:
    """Whether a module is a BatchNorm whose population lies on all ranks: they have tracked the same."""
    group = population_group(norm, in_training=True) if isinstance(norm, _BatchNorm) else None
    return group is not None and torch.distributed.get_world_size(group) == n_ranks


def _mean_over_ranks(accelerator: Accelerator, values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each tensor's mean: one all-reduce for those of a dtype and device together."""
    kinds: dict[Any, list[int]] = {}
    for index, value in enumerate(values):
        kinds.setdefault((value.dtype, value.device), []).append(index)
    means = list(values)
    for indices in kinds.values():
        flat = accelerator.reduce(torch.cat([values[index].flatten() for index in indices]), "mean")
        parts = flat.split([values[index].numel() for index in indices])
        for index, part in zip(indices, parts, strict=True):
            means[index] = part.view_as(values[index])
    return means


def describe(accelerator: Accelerator, precision: str) -> str:
    """The engine, its processes, their devices and precision in words."""
    count = accelerator.num_processes
    words = [_engine_words(accelerator), "one process" if count == 1 else f"{count} processes"]
    words += ["CPU" if accelerator.device.type == "cpu" else str(accelerator.device)]
    return ", ".join([*words, precision_words(precision)])


def _engine_words(accelerator: Accelerator) -> str:
    plugin = accelerator.state.deepspeed_plugin
    if accelerator.is_fsdp2:
        return "FSDP2"
    if plugin is None:
        backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else ""
        return f"DDP ({backend})" if accelerator.num_processes > 1 else "plain PyTorch"
    zero = plugin.deepspeed_config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer", {}).get("device", "none")
    return f"DeepSpeed ZeRO stage {zero.get('stage', 0)}, optimizer offload {offload}"
