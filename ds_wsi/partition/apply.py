"""`partition_layers`: a module that computes in chunks, in place, and back."""

from collections.abc import Callable

import torch
from torch import nn

from ds_wsi.partition.execution.host_store import Spill
from ds_wsi.partition.execution.paper import apply_paper
from ds_wsi.partition.forward import PartitionedForward
from ds_wsi.partition.module.beside import watch_children
from ds_wsi.partition.module.hooks import is_compiled, uncompiled
from ds_wsi.partition.module.partitioned import is_partitioned, refuse_partitioned_parts
from ds_wsi.partition.module.shards import give_anchor
from ds_wsi.partition.planning.plan import PartitionPlan
from ds_wsi.partition.planning.search import PAPER_CHUNK
from ds_wsi.partition.policy import PartitionPolicy
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.seams import check_seams


class Handle:
    """What `partition_layers` returns.

    Attributes:
        forward: the module's present forward, None once it is removed, and in mode "paper".
    """

    def __init__(
        self, module: nn.Module, forward: PartitionedForward | None, undo: Callable[[], None] | None = None
    ) -> None:
        self.module, self.forward, self._undo = module, forward, undo

    def remove(self) -> None:
        """Give the module its own forward back.

        Raises:
            ValueError: another forward was set over the partition's since; nothing is removed.
        """
        if self.forward is not None:
            present = self.module.__dict__.get("forward", self.forward)
            if present is not self.forward:
                name = getattr(present, "__qualname__", type(present).__qualname__)
                raise ValueError(
                    f"a partition must be the module's forward to be removed, got {name!r} set over it "
                    f"({type(self.module).__name__}). HINT: take that off first."
                )
        if self._undo is not None:
            self._undo()
            self._undo = None
        if self.forward is not None:
            original = self.forward.original
            if getattr(original, "__self__", None) is self.module:
                self.module.__dict__.pop("forward", None)
            else:  # somebody else's wrapper was there before us
                self.module.forward = original
            self.forward = None


def partition_layers(
    module: nn.Module,
    plan_or_policy: PartitionPlan | PartitionPolicy,
    *,
    spill: Spill | None = None,
    check: bool = True,
) -> Handle:
    """Compute `module` in chunks, in place: same state_dict, same outputs and gradients, another memory.

    The first argument of the module's forward is the tiles; what stands beside them is shared by all. In training mode
    BatchNorm normalises over all tiles of the call; other layers must treat tiles independently. Parameters' gradients
    are summed in float32 (float64) and handed to autograd once, which runs the hooks on them once. Parameters, buffers
    and the input must not change in place between forward and backward, biases included. Of a module that torch.compile
    has wrapped, what it has wrapped is partitioned.

    Args:
        module: an encoder of tiles [N, ...] -> [N, ...] (axis "batch"), or of images (axis "spatial").
        plan_or_policy: of `plan_partition`, or what it would be asked: then each call is planned for its size.
        spill: the disk of a policy with `nvme_path`: `ds_wsi.NvmeSpill(path)`.
        check: compare the partition with the module alone, on up to 4 tiles, before the first call of each kind
            (`ds_wsi.partition.checking.check`); a policy's `check` switches it off too.

    Returns:
        A handle; `handle.remove()` undoes it.

    Raises:
        ValueError: the module or a part of it is partitioned already, or checkpoints itself.
    """
    check_seams("torch", "class", "partition")
    if is_compiled(module):
        logger.warning(
            "partition: what torch.compile made of %s is left out, its chunks run uncompiled. "
            "HINT: PartitionPolicy(compile=True)",
            type(uncompiled(module)).__name__,
        )
        module = uncompiled(module)
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
    if spill is None and plan_or_policy.nvme_path:
        raise ValueError(
            f"{type(module).__name__}: a policy or plan with a disk must come with the disk, got spill=None. "
            "HINT: partition_layers(module, policy, spill=ds_wsi.NvmeSpill(path))."
        )
    if plan_or_policy.mode == "paper":
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        axis = plan_or_policy.axis
        chunk = plan_or_policy.chunk_size or PAPER_CHUNK[axis]
        # An eighth of the budget for a map: a layer's input and output, their gradients, and room.
        stop = (getattr(plan_or_policy, "gpu_budget_bytes", None) or 0) // 8
        undo = apply_paper(module, device=device, axis=axis, chunk=chunk, stop_bytes=stop)
        hook = module.register_forward_pre_hook(lambda _, inputs: (inputs[0].cpu(), *inputs[1:]))

        def restore() -> None:
            hook.remove()
            undo()

        return Handle(module, None, restore)
    forward = PartitionedForward(module, plan_or_policy, spill, check=check and getattr(plan_or_policy, "check", True))
    module.forward = forward
    hook = module.register_forward_pre_hook(give_anchor)
    # A compiler would break its graph at hooks.
    unwatch = (lambda: None) if plan_or_policy.compile else watch_children(module)

    def take_off() -> None:
        hook.remove()
        unwatch()

    logger.debug("partitioned %s", type(module).__name__)
    return Handle(module, forward, take_off)
