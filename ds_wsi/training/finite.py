"""A loss or a weight that is no finite number is noticed at its step: nothing of it reaches a checkpoint."""

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_wsi.engines.accelerator.engine import gather_object
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.words import counted, some
from ds_wsi.training.context import RunContext
from ds_wsi.training.run import Run

SHOWN = 8  # slides that are named
MOST_SKIPPED = 64  # steps in a row: a loss scale has then come from 65536 to nothing


class NotFiniteError(ValueError):
    """The run has come to a number that is infinite or none; names step and slides."""


class BagsAndLosses(NamedTuple):
    """A micro-step's slides on this rank, and whether each one's logits are finite, bool [B] on the device."""

    slides: tuple[str, ...]
    finite: Tensor


@torch.no_grad()
def weights_seem_finite(module: nn.Module, device: torch.device) -> Tensor:
    """Whether the sums of the weights are finite: then the weights are. The CPU does not wait for the device.

    Weights are the parameters that are trained, or this rank's parts of them, and the buffers that are saved. One pass
    over them after a step: a gradient that is not finite has made the weights so in any optimizer.

    Returns:
        bool scalar on the device. False can also be a sum that is too large: `weights_are_finite` knows.
    """
    # Of half precision in float32: its own sums end at 65504.
    sums = [one.sum(dtype=torch.promote_types(one.dtype, torch.float32)).double() for one in _weights(module)]
    if not sums:
        return torch.ones((), dtype=torch.bool, device=device)
    return torch.stack([one.to(device) for one in sums]).isfinite().all()


@torch.no_grad()
def weights_are_finite(module: nn.Module) -> bool:
    """Whether every number in the weights is finite; see `weights_seem_finite`, which is a tenth of the work."""
    return all(bool(one.isfinite().all()) for one in _weights(module))


def _weights(module: nn.Module) -> list[Tensor]:
    local = [_local(parameter) for parameter in module.parameters() if parameter.requires_grad]
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                local.append(buffer)
    return [one for one in local if one.is_floating_point() and one.numel()]


def _local(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: all, its shard (FSDP2), or its partition (ZeRO-3)."""
    whole: Any = parameter
    if hasattr(whole, "to_local"):
        return whole.to_local().detach()
    partition = getattr(whole, "ds_tensor", None)
    if partition is None:
        return whole.detach()
    # Where a weight does not divide, the last partitions are longer than what is left of it. In their rest DeepSpeed
    # leaves whatever its memory held before; its gradients are zero there: no norm and no search for overflow sees it.
    before = dist.get_rank(whole.ds_process_group) * partition.numel()
    return partition.detach().reshape(-1)[: max(0, whole.ds_numel - before)]


def skips_overflow(run: RunContext) -> bool:
    """Whether the engine scales the loss, and leaves a step out whose gradients have overflowed."""
    return run.settings.optim.mixed_precision == "fp16"


def tell_skipped_steps(run: Run, in_a_row: int) -> None:
    """Say of the first of several steps in a row that it is left out.

    Raises:
        NotFiniteError: too many in a row.
    """
    if in_a_row == 1:
        step = run.progress.global_step
        logger.info("step %d: fp16 overflowed, the step is left out and the loss scale lowered", step)
    if in_a_row >= MOST_SKIPPED:
        raise NotFiniteError(
            f"a step must be finite in fp16 at some loss scale, got {in_a_row} in a row that were not (last: step "
            f"{run.progress.global_step}). HINT: --bf16 in place of --fp16, or a lower --learning_rate."
        )


def mean_loss(run: Run) -> float:
    """The mean loss of the epoch's bags that have a finite one.

    Raises:
        NotFiniteError: there is none.
    """
    if not run.progress.bags_seen:
        raise NotFiniteError(
            f"an epoch must have a finite loss, got none in epoch {run.progress.epoch + 1}: fp16 overflows in every "
            "step. HINT: --bf16 in place of --fp16, or a lower --learning_rate."
        )
    return run.progress.loss_sum / run.progress.bags_seen


def tell_not_finite(run: Run, step: int, micro_steps: Sequence[BagsAndLosses], *, loss_is_finite: bool) -> NoReturn:
    """Raise on all ranks, with the slides of all. Collective: a gather.

    Args:
        run: the run that took the step.
        step: the step's number in the run, from 0.
        micro_steps: this rank's of the step.
        loss_is_finite: whether the loss is; then gradient or weights are not.

    Raises:
        NotFiniteError: always.
    """
    names = [
        slide
        for micro in micro_steps
        for slide, finite in zip(micro.slides, micro.finite.tolist(), strict=True)
        if loss_is_finite or not finite
    ]
    slides = sorted(set(gather_object(names)))
    what = "gradient and weights" if loss_is_finite else "the loss"
    raise NotFiniteError(
        f"{what} must be finite, got infinity or no number in epoch {run.progress.epoch + 1}, step {step}, of "
        f"{counted(len(slides), 'slide')} ({some(slides, SHOWN)}). Nothing of it was saved: the last checkpoint is of "
        f"before. HINT: look at these slides' tiles or features, lower --learning_rate, {_remedy(run)}."
    )


def _remedy(run: RunContext) -> str:
    if run.settings.optim.mixed_precision != "no":
        return "or leave out --fp16 and --bf16"
    return "or clip with --max_grad_norm 1" if run.settings.optim.max_grad_norm == 0 else "or clip more"
