"""What the sums of a step's stacks are divided by, so that any split of the step has one process's gradient.

Engines take the mean over W ranks and P micro-steps. Per target t, with D_t the labelled units of the whole step, the
sum of each stack is multiplied by lambda_t W P / D_t: the mean of those is lambda_t / D_t times the sum over the step.
A mean per micro-step is exact only where each holds as many labelled units as every other.

D_t is known from the manifest and the step's plan, on every rank, without communication.
"""

from torch import Tensor

from ds_wsi.targets.sums import MISSING


def labelled_units(targets: Tensor) -> int:
    """Targets that are known: bags; of a multilabel target, pairs of bag and label. CORN's are `corn_units`.

    Args:
        targets: [B] or [B, L], on the host: classes or bins (int64, `MISSING` where not known), or values (NaN).
    """
    present = ~targets.isnan() if targets.is_floating_point() else targets != MISSING
    return int(present.sum())


def corn_units(labels: Tensor, n_classes: int) -> int:
    """Units of `corn_loss`: bit k asks the bags whose class is k or higher, all bits together.

    Args:
        labels: int64 [B], on the host, in [0, K) or `MISSING`.
        n_classes: K.
    """
    asked = labels.clamp(max=n_classes - 2) + 1
    return int(asked[labels != MISSING].sum())


def target_factor(units: int, world_size: int, accumulation: int, weight: float = 1.0) -> float:
    """The factor on a stack's sum, lambda W P / D; 0 in a step without a labelled unit.

    Args:
        units: D, of the whole step: all ranks, all micro-steps; 1 for `cox_surrogate`, which is divided already.
        world_size: W, the ranks over which the engine takes the mean; groups, where ranks share bags.
        accumulation: P, the micro-steps of the step.
        weight: lambda, of the target among several.

    Raises:
        ValueError: a count that cannot be.
    """
    if units < 0 or world_size < 1 or accumulation < 1:
        raise ValueError(
            "a step must have 0 labelled units or more, one rank and one micro-step or more, got "
            f"{units}, {world_size} and {accumulation}"
        )
    return weight * world_size * accumulation / units if units else 0.0
