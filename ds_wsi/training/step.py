"""One micro-step: the stack's loss, weighted so that the engine's mean is the mean over the step's bags."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.models.loss import stack_loss
from ds_wsi.models.output import SlideOutput
from ds_wsi.models.slide_model import SlideModel
from ds_wsi.stacking.stacked_bags import StackedBags, stack_bags


def bag_weight(bags_in_step: int, world_size: int, accumulation: int) -> float:
    """The factor on a bag's loss: engines take the mean over ranks and micro-steps, the step's is over its bags.

    With it the gradient is (1 / B) sum_b grad l_b over the step's B bags, however unevenly they lie on the ranks.
    """
    return world_size * accumulation / bags_in_step


def _once(compute: Callable[[], Tensor]) -> Tensor:
    return compute()


def run_micro_step(
    accelerator: Any,
    model: nn.Module,
    optimizer: Any,
    compute: Callable[[], Tensor],
    weight: float,
    *,
    max_grad_norm: float = 0.0,
    guard: Callable[[Callable[[], Tensor]], Tensor] = _once,
) -> Tensor:
    """One micro-step of a process: forward, backward, and after a step's last one the optimizer's step.

    Collective, as the engine is; a process without a bag computes `idle_loss`.

    Args:
        accelerator: Accelerate's, of whatever engine.
        model: what `accelerator.prepare` returned for it.
        optimizer: likewise.
        compute: returns the sum of the losses of this process's bags, with its graph.
        weight: factor of the loss, see `bag_weight`.
        max_grad_norm: norm to which a larger gradient of the step is scaled down; 0 clips nothing.
        guard: calls forward and backward, and may call them again where they ran out of memory.

    Returns:
        What `compute` returned, detached.
    """

    def forward_backward() -> Tensor:
        loss = compute()
        accelerator.backward(loss * weight)
        return loss.detach()

    with accelerator.accumulate(model):
        loss = guard(forward_backward)
        if accelerator.sync_gradients and max_grad_norm > 0:
            accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return loss


def blank_tile(tile_size_px: int, device: torch.device) -> Tensor:
    """A white tile as a bag: uint8 [1, 3, S, S]."""
    return torch.full((1, 3, tile_size_px, tile_size_px), 255, dtype=torch.uint8, device=device)


def idle_loss(model: nn.Module, blank: Tensor) -> Tensor:
    """The zero loss of a rank without a bag: it takes part in every collective and changes nothing.

    Args:
        model: a SlideModel, wrapped by the engine.
        blank: a bag of one instance, of what the model takes: `blank_tile`, or features [1, D].
    """
    # With a label, so that what the auxiliary loss alone trains takes part too.
    label = torch.zeros(1, dtype=torch.int64, device=blank.device)
    return stack_loss(idle_output(model, blank, label), label) * 0.0


def idle_output(model: nn.Module, blank: Tensor, label: Tensor | None = None) -> SlideOutput:
    """What a rank without a bag takes part in the others' forward with; nothing may be learned from it.

    Args:
        model, blank: see `idle_loss`.
        label: int64 [1], or None of another task than classification.
    """
    module = next(part for part in model.modules() if isinstance(part, SlideModel))
    with module.idling():
        more: list[Tensor | None] = [] if label is None else [label]
        if module.scale_embedding is not None:
            more = [label, torch.zeros(1, dtype=torch.int64, device=blank.device)]
        output: SlideOutput = model(StackedBags(*stack_bags([blank])), *more)
    return output
