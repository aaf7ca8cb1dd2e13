"""FSDP2 under Accelerate: which modules are its units, and whole tensors of its shards.

The units are ours, everything else is Accelerate's: accumulation, clipping, checkpoints. Its own wrapping chooses units
by class names or sizes, which no two encoders share; and it finds an optimizer's parameters again by their addresses,
which all empty shards have in common. So modules are sharded first, and the optimizer is built over the shards.
"""

import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ds_wsi.runtime.contracts import HasAggregator, HasEncoder, encodes_stacks
from ds_wsi.runtime.seams import check_seams

_USES_FSDP = "ACCELERATE_USE_FSDP"
# The launcher's variable -> (Accelerate's value where it is absent, the one that is followed, what serves instead).
_LAUNCHER = {
    "FSDP_VERSION": ("1", "2", "accelerate launch --use_fsdp --fsdp_version 2"),
    "FSDP_OFFLOAD_PARAMS": ("false", "false", "a DeepSpeed JSON with offload_param"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "false", "--partition checkpoint"),
    "FSDP_AUTO_WRAP_POLICY": ("no_wrap", "no_wrap", "the encoder's blocks are the units"),
}
# What Accelerate 1.10 has not yet, and later versions take from variables of the environment.
_LATER_SWITCHES = ("activation_checkpointing_offload",)


def launched_with_fsdp() -> bool:
    """Whether `accelerate launch --use_fsdp` started this process."""
    return os.environ.get(_USES_FSDP, "false").lower() == "true"


def fsdp_plugin() -> FullyShardedDataParallelPlugin:
    """Accelerate's plugin for FSDP2, with the launcher's `--fsdp_reshard_after_forward` where it gives one.

    Raises:
        ValueError: the launcher asks for FSDP 1, or for what is done in another way here; names it.
    """
    if launched_with_fsdp():
        for name, (given, needed, remedy) in _LAUNCHER.items():
            value = os.environ.get(name, given).lower()
            if value != needed:
                raise ValueError(f"--{name.lower()} must be {needed}, got {value}. HINT: {remedy}.")
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true"),
        # Mixed precision is by autocast: BatchNorm takes no halved weights beside float32 statistics.
        mixed_precision_policy=MixedPrecisionPolicy(),
        auto_wrap_policy="NO_WRAP",
        cpu_offload=False,
        state_dict_type="SHARDED_STATE_DICT",
        activation_checkpointing=False,
        cpu_ram_efficient_loading=False,
        **{name: False for name in _LATER_SWITCHES if name in FullyShardedDataParallelPlugin.__dataclass_fields__},
    )


def build_with_fsdp(plugin: FullyShardedDataParallelPlugin, **keywords: Any) -> Accelerator:
    """An Accelerator that drives FSDP2, on a CPU too.

    Raises:
        ValueError: there is one process.
    """
    check_seams("accelerate", "engine")
    launched = launched_with_fsdp()
    try:
        accelerator = Accelerator(fsdp_plugin=plugin, **keywords)
    finally:
        if not launched:  # Accelerate's trace of the plugin, which later Accelerators would follow
            os.environ.pop(_USES_FSDP, None)
    if accelerator.num_processes == 1:
        raise ValueError(
            "FSDP2 must have at least 2 processes to shard the model over, got 1. "
            "HINT: torchrun --standalone --nproc_per_node 2, or leave out --fsdp."
        )
    if accelerator.device.type == "cpu":
        # Accelerate knows FSDP beside an accelerator alone, and would go on with DDP.
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def shard_model(model: nn.Module, accelerator: Accelerator) -> None:
    """Shard the model's parameters over all ranks, in place: each unit is gathered around its forward and backward.

    Units are the encoder's blocks (`encoder_blocks`), the encoder with what is left of it, the aggregator and the root.
    An encoder whose forward computes in parts, as a partitioned one, is one unit: ranks with more parts would gather
    more often than others, and wait for them for ever.

    Args:
        model: a model with `encoder` and `aggregator`; another is one unit.
        accelerator: what `build_with_fsdp` returned.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    reshard = accelerator.state.fsdp_plugin.reshard_after_forward
    encoder = model.encoder if isinstance(model, HasEncoder) else None
    aggregator = model.aggregator if isinstance(model, HasAggregator) else None
    if encoder is not None:
        for unit in (*([] if encodes_stacks(encoder.forward) else encoder_blocks(encoder)), encoder):
            if _has_parameters(unit):
                fully_shard(unit, mesh=mesh, reshard_after_forward=reshard)
    if aggregator is not None:
        # Its backward comes at once.
        fully_shard(aggregator, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    for part in {type(part).__name__ for part in (encoder, aggregator, model) if part is not None}:
        # Nobody changes features or logits in place.
        warnings.filterwarnings("ignore", message=f"FSDP2-wrapped module .{part}. returned a view tensor")


def encoder_blocks(encoder: nn.Module) -> list[nn.Module]:
    """The blocks of an encoder: what its Sequentials and ModuleLists hold, but for single layers.

    ResNet's and EfficientNet's residual blocks, ViT's transformer blocks, the stages of ConvNeXt and Swin. None where
    parameters are shared within the encoder, because each can be in one unit only, nor in a plain stack of layers.
    """
    shared = len(list(encoder.named_parameters(remove_duplicate=False))) > len(list(encoder.parameters()))
    return [] if shared else list(_blocks(encoder))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    lists = (nn.Sequential, nn.ModuleList)
    for child in module.children():
        if isinstance(child, lists):
            yield from _blocks(child)
        elif isinstance(module, lists) and list(child.children()) and _has_parameters(child):
            yield child


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def is_fsdp2(model: nn.Module) -> bool:
    """Whether the parameters of `model` are sharded over the ranks by FSDP2."""
    return any(isinstance(part, FSDPModule) for part in model.modules())


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor in one piece, detached; another as it is. Collective where it is sharded: one all-gather."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_whole(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor, the same on all ranks, into one that may be sharded, in place. No collectives."""
    if isinstance(target, DTensor):
        source = source.to(target.device)
        source = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(source)
