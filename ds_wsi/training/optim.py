"""Learning rate and momentum as functions of the step, and the moving average of the weights.

Of the first two there is nothing to save, a resumed run computes what they would have been; the average is part of the
checkpoint.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.runtime.log import logger
from ds_wsi.runtime.tensor_file import TensorFile
from ds_wsi.training.settings.optim import SCHEDULES

DECAY_AN_EPOCH = 0.955  # of the exponential schedule, as the end-to-end papers on PANDA have it


def learning_rate_at(
    step: int, *, total_steps: int, peak: float, schedule: str, warmup_steps: int, steps_per_epoch: int = 1
) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up to `peak`, then the schedule.

    Cosine and linear end at 0 after `total_steps`; exponential falls by 4.5% an epoch of `steps_per_epoch` steps,
    counted from the end of the warm-up.

    Raises:
        ValueError: an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"--lr_scheduler_type must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "exponential":
        return peak * DECAY_AN_EPOCH ** ((step - warmup_steps) // steps_per_epoch)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)


def warn_of_warmup(warmup_steps: int, total_steps: int) -> None:
    """Say that a run ends before its warm-up, or with it: its rate then only rises."""
    if warmup_steps and warmup_steps >= total_steps:
        logger.warning(
            "--warmup_steps %d: the run has %d optimizer steps, and its learning rate only rises, to %d%% of its peak. "
            "HINT: --warmup_steps %d, more --num_train_epochs, or fewer --bags_per_step.",
            *(warmup_steps, total_steps, 100 * total_steps // warmup_steps, total_steps // 10),
        )


def demon_beta(step: int, *, total_steps: int, initial: float) -> float:
    """Adam's first beta of optimizer step `step` (from 0): `initial` at first, 0 after `total_steps`.

    Source: Chen et al., "Demon: Improved Neural Network Training with Momentum Decay", equation 2.
    """
    left = 1 - step / total_steps
    return initial * left / ((1 - initial) + initial * left)


def set_beta(optimizer: Any, beta: float) -> None:
    """Set the first of every parameter group's betas, in place; Adam reads them anew at each step.

    Raises:
        ValueError: an optimizer without betas.
    """
    for group in optimizer.param_groups:
        if "betas" not in group:
            raise ValueError(
                f"--demon must be given with an optimizer that has betas, got one with {', '.join(sorted(group))}. "
                "HINT: --optim adam."
            )
        group["betas"] = (beta, *group["betas"][1:])


class WeightAverage:
    """The exponential moving average of a model's trained parameters, in float32 on their device.

    Buffers are not averaged: BatchNorm's are moving averages already, and the ranks' differ within an epoch. Under
    FSDP2 each rank averages its shards.

    Args:
        module: unwrapped, under any engine but ZeRO-3: the ranks' averages agree.
        decay: the average's; in the first steps 1 - 9 / (10 + steps), where that is less, because else a short run's
            average would be its initial weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.averages = {name: p.detach().float().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the weights after an optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, parameter in module.named_parameters():
            if name in self.averages:
                self.averages[name].lerp_(parameter.float(), 1 - decay)

    def weights(self) -> dict[str, Tensor]:
        """The averages by parameter name, whole float32 copies on the CPU. Collective under FSDP2."""
        from ds_wsi.engines.sharded.fsdp import whole  # here, because the schedules' names need no engine

        return {name: whole(average).to("cpu", copy=True) for name, average in self.averages.items()}

    def load(self, file: TensorFile, steps: int) -> None:
        """Go on from a checkpoint's file of `weights()`, the same on all ranks, after so many steps.

        Raises:
            ValueError: averages of another model.
        """
        from ds_wsi.engines.sharded.fsdp import copy_whole

        if file.names != self.averages.keys():
            raise ValueError(
                f"{file.path} must hold the averages of the {len(self.averages)} trained parameters, got "
                f"{len(file.names)}. HINT: it is of another model."
            )
        self.steps = int(steps)
        for name, average in self.averages.items():
            copy_whole(average, file.read_like(name, average))
