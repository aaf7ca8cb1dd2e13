"""The learning rate as a function of the step: nothing to save, a resumed run computes what it would have been."""

import math

SCHEDULES = ("cosine", "linear", "constant")


def learning_rate_at(step: int, *, total_steps: int, peak: float, schedule: str, warmup_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up to `peak`, then the schedule down to 0.

    Raises:
        ValueError: an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"--lr_scheduler_type must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)
