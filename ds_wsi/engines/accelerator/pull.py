"""L2-SP: in each step the encoder's weights are drawn towards those that they started from, beside the gradient.

theta <- theta - lr lambda (theta - theta_0) before the optimizer's own step, as AdamW decays weights towards zero: what
Adam divides by knows nothing of it. It is done where the optimizer steps, on what each rank steps: whole parameters,
FSDP2's shards, or ZeRO's partitions of the float32 weights. The starting weights lie beside them, in as many parts.

Source: Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning" (2018); decoupled as in Loshchilov
and Hutter, "Decoupled Weight Decay Regularization" (2019).
"""

from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.engines.sharded.zero import is_zero3


def pull_to_start(module: nn.Module, optimizer: Any, strength: float, marked: str) -> None:
    """Draw the parameters of some groups to what they are now, at each step from now on.

    Args:
        module: the unwrapped model.
        optimizer: what `prepare` returned; a step that an engine leaves out draws nothing either.
        strength: lambda; a group's learning rate is its own.
        marked: the key that says which groups are drawn.

    Raises:
        ValueError: the optimizer's weights lie on a disk.
    """
    zero = inner = optimizer
    while hasattr(inner, "optimizer"):  # Accelerate's wrapper, and ZeRO's around the one that steps
        zero, inner = inner, inner.optimizer
    if getattr(zero, "swap_optimizer", False):
        raise ValueError(
            "--l2_sp must be given with an optimizer whose weights lie in memory, got offload_optimizer.device nvme. "
            'HINT: "device": "cpu".'
        )
    shards = _zero3_shards(zero, inner) if is_zero3(module) else _whole_groups(inner)
    start = {id(one): one.detach().clone() for group, one in shards if group.get(marked)}

    def draw(stepping: Any, *_: object) -> None:
        with torch.no_grad():
            for group in stepping.param_groups:
                for parameter in group["params"] if group.get(marked) and group["lr"] else ():
                    parameter.lerp_(start[id(parameter)], group["lr"] * strength)

    inner.register_step_pre_hook(draw)


def _whole_groups(inner: Any) -> list[tuple[dict[str, Any], Tensor]]:
    """What the optimizer steps, under ZeRO 1 and 2 this rank's stretch of each flat group."""
    return [(group, parameter) for group in inner.param_groups for parameter in group["params"]]


def _zero3_shards(zero: Any, inner: Any) -> list[tuple[dict[str, Any], Tensor]]:
    """ZeRO 3 gives the optimizer one flat group after the other, at the step."""
    numbers = zero.sub_group_to_group_id
    return [
        (inner.param_groups[numbers[index]], shard) for index, shard in enumerate(zero.fp32_partitioned_groups_flat)
    ]
