"""How many bags an optimizer step has, and how they lie on processes and micro-steps."""

import math
from dataclasses import dataclass

from ds_wsi.stacking.policy import StackingPolicy


@dataclass(frozen=True)
class StepLayout:
    """The size of a step.

    Args:
        groups: number of processes that have bags of their own; under tile parallelism, of groups that share them.
        bags_per_group: number of bags of a group in a micro-step, where no policy deals them.
        micro_steps: number of micro-steps of a step, which a policy calls virtual workers.
        stacking: the policy that deals the bags of a step; None deals them in turn.
    """

    groups: int = 1
    bags_per_group: int = 1
    micro_steps: int = 1
    stacking: StackingPolicy | None = None

    @property
    def bags_per_step(self) -> int:
        """Bags of a step over all groups and micro-steps; an epoch's last step can have fewer."""
        dealt = None if self.stacking is None else self.stacking.bags_per_step
        return dealt or self.groups * self.bags_per_group * self.micro_steps

    def steps_per_epoch(self, n_bags: int) -> int:
        """Optimizer steps that cover every bag once."""
        return math.ceil(n_bags / self.bags_per_step)
