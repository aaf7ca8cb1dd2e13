"""`partition_layers`: a module that computes in chunks, in place, and back."""

import torch
from torch import nn

from ds_wsi.partition.execution.host_store import Spill
from ds_wsi.partition.execution.paper import apply_paper
from ds_wsi.partition.forward import PartitionedForward
from ds_wsi.partition.module.beside import watch_children
from ds_wsi.partition.module.devices import device_of, refuse_devices
from ds_wsi.partition.module.hooks import is_compiled, uncompiled
from ds_wsi.partition.module.partitioned import is_partitioned, refuse_other_holder, refuse_partitioned_parts
from ds_wsi.partition.module.shards import give_anchor
from ds_wsi.partition.planning.plan import PartitionPlan
from ds_wsi.partition.planning.search import PAPER_CHUNK
from ds_wsi.partition.policy import PartitionPolicy
from ds_wsi.runtime.forwards import Handle
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.seams import check_seams


def partition_layers(
    module: nn.Module,
    plan_or_policy: PartitionPlan | PartitionPolicy,
    *,
    spill: Spill | None = None,
    check: bool = True,
) -> Handle[PartitionedForward | None]:
    """Compute `module` in chunks, in place: same state_dict, same outputs and gradients, another memory.

    The first argument of the module's forward is the tiles; what stands beside them is shared by all. In training mode
    BatchNorm normalises over all tiles of the call; other layers must treat tiles independently. Parameters' gradients
    are summed in float32 (float64) and handed to autograd once, which runs the hooks on them once. Parameters, buffers
    and the input must not change in place between forward and backward, biases included. Of a module that torch.compile
    has wrapped, what it has wrapped is partitioned.

    Args:
        module: an encoder of tiles [N, ...] -> [N, ...] (axis "batch"), or of images (axis "spatial").
        plan_or_policy: a plan of `plan_partition`, or the policy to ask it with: each call is planned for its size.
        spill: the disk of a policy with `nvme_path`: `ds_wsi.NvmeSpill(path)`.
        check: compare the partition with the module alone, on up to 4 tiles, before the first call of each kind
            (`ds_wsi.partition.checking.check`); a policy's `check` switches it off too.

    Returns:
        A handle; `handle.remove()` undoes it.

    Raises:
        ValueError: the module or a part of it is partitioned already, or checkpoints itself; in mode "paper", lies on
            several devices.
    """
    check_seams("torch", "class", "partition")
    if is_compiled(module):
        logger.warning(
            "partition: what torch.compile made of %s is left out, its chunks run uncompiled. "
            "HINT: PartitionPolicy(compile=True)",
            type(uncompiled(module)).__name__,
        )
        module = uncompiled(module)
    _refuse_what_is_set(module)
    if spill is None and plan_or_policy.nvme_path:
        raise ValueError(
            f"{type(module).__name__}: a policy or plan with a disk must come with the disk, got spill=None. "
            "HINT: partition_layers(module, policy, spill=ds_wsi.NvmeSpill(path))."
        )
    if plan_or_policy.mode == "paper":
        return _in_paper_mode(module, plan_or_policy)
    if isinstance(plan_or_policy, PartitionPolicy):
        check = check and plan_or_policy.check
    forward = PartitionedForward(module, plan_or_policy, spill, check=check)
    handle = Handle[PartitionedForward | None](
        module,
        forward,
        "a partition",
        module.register_forward_pre_hook(give_anchor).remove,
        module.register_forward_pre_hook(refuse_other_holder).remove,
        # A compiler would break its graph at hooks.
        *(() if plan_or_policy.compile else (watch_children(module),)),
    )
    logger.debug("partitioned %s", type(module).__name__)
    return handle


def _refuse_what_is_set(module: nn.Module) -> None:
    """Refuse a module that is partitioned already, or holds a part that is, or checkpoints itself."""
    if is_partitioned(module):
        raise ValueError(f"{type(module).__name__} must not be partitioned twice. HINT: handle.remove() first.")
    refuse_partitioned_parts(module)
    for name, part in module.named_modules():
        flags = (getattr(part, "grad_checkpointing", False), getattr(part, "gradient_checkpointing", False))
        if any(flag is True for flag in flags):
            raise ValueError(
                f"{name or type(part).__name__} must not checkpoint itself inside a partition, got "
                'grad_checkpointing=True. HINT: switch it off; mode "checkpoint" does the same, exactly.'
            )


def _in_paper_mode(
    module: nn.Module, plan_or_policy: PartitionPlan | PartitionPolicy
) -> Handle[PartitionedForward | None]:
    """Partition the module layer by layer, in place: see `apply_paper`."""
    device = device_of(module, torch.device("cpu"))
    refuse_devices(module, device)
    axis = plan_or_policy.axis
    chunk = plan_or_policy.chunk_size or PAPER_CHUNK[axis]
    # An eighth of the budget for a map: a layer's input and output, their gradients, and room.
    stop = (plan_or_policy.gpu_budget_bytes or 0) // 8
    undo = apply_paper(module, device=device, axis=axis, chunk=chunk, stop_bytes=stop)
    hook = module.register_forward_pre_hook(refuse_other_holder)
    return Handle[PartitionedForward | None](module, None, "a partition", undo, hook.remove)
