"""How much is sent at which step: dense at first, then less and less."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KeepSchedule:
    """A warm-up of the keep ratio (DGC, arXiv 1712.01887, section 3.3: sparsity 75, 93.75, 98.44, 99.6, 99.9 %).

    Early gradients are large and change fast, and Adam's second moments would take a burst from the residuals for a
    large gradient: nothing is dropped in the first `dense_steps`. By default there is no warm-up.

    Attributes:
        dense_steps: steps, from 0, that send everything.
        stage_steps: steps of each following stage; 0: no stages.
        stages: keep ratios in order; one below the policy's own is raised to it.
    """

    dense_steps: int = 0
    stage_steps: int = 0
    stages: tuple[float, ...] = (0.25, 0.0625, 0.015625, 0.004, 0.001)

    def __post_init__(self) -> None:
        for name in ("dense_steps", "stage_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}. HINT: 0 leaves it out")
        ordered = list(self.stages) == sorted(self.stages, reverse=True)
        if not ordered or not all(0 < stage <= 1 for stage in self.stages):
            raise ValueError(
                f"stages must be keep ratios in (0, 1] that do not rise, got {self.stages}. HINT: such as (0.25, 0.05)"
            )

    def keep_at(self, step: int, keep: float) -> float:
        """The keep ratio of a step, of a policy whose own is `keep`.

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"a step must be at least 0, got {step}")
        if step < self.dense_steps:
            return 1.0
        if self.stage_steps == 0 or step >= self.dense_steps + self.stage_steps * len(self.stages):
            return keep
        return max(keep, self.stages[(step - self.dense_steps) // self.stage_steps])
