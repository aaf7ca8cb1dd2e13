"""The slides that each rank trains on at each step: a pure plan of (seed, epoch), so that a resumed run repeats it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from ds_wsi.bags.step_layout import StepLayout
from ds_wsi.runtime.seeding import slide_seed
from ds_wsi.stacking.balance import OverCapError, assign_bags
from ds_wsi.stacking.policy import StackingPolicy


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step.

    Attributes:
        micro_steps: per micro-step, per rank, the indices of the slides; a rank's tuple can be empty in an epoch's
            last step, and every rank has the same number of micro-steps.
    """

    micro_steps: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def n_bags(self) -> int:
        """Bags in the step over all ranks and micro-steps: the loss is the sum of the bags' losses over this."""
        return sum(len(slides) for ranks in self.micro_steps for slides in ranks)

    @property
    def as_one(self) -> "StepPlan":
        """The same step in one micro-step."""
        by_rank = zip(*self.micro_steps, strict=True)
        return StepPlan((tuple(tuple(slide for own in rank for slide in own) for rank in by_rank),))


def plan_epoch(
    n_slides: int, layout: StepLayout, *, seed: int, epoch: int, lengths: Sequence[int] = ()
) -> tuple[StepPlan, ...]:
    """Shuffle the slides by (seed, epoch) and deal them out: every slide once per epoch, none twice.

    Slides are dealt to the ranks in turn, so that a short last step leaves ranks within one bag of each other; with a
    policy, by its balance and under its cap. The slides of step k depend on the bags of a step alone, not on how they
    are dealt.

    Args:
        n_slides: number of slides of the epoch.
        layout: the size of a step, and the policy that deals its bags.
        seed: seed of the order.
        epoch: number of the epoch, which has an order of its own.
        lengths: tiles of each slide, for a policy.

    Raises:
        OverCapError: bags exceed the policy's cap; `bag` is the slide, where it is one.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(n_slides, generator=generator).tolist()
    size = layout.bags_per_step
    steps = [order[start : start + size] for start in range(0, n_slides, size)]
    if layout.stacking is None:
        return tuple(_deal(slides, layout) for slides in steps)
    return tuple(_deal_by_policy(slides, layout, layout.stacking, lengths) for slides in steps)


def _deal_by_policy(
    slides: Sequence[int], layout: StepLayout, stacking: StackingPolicy, lengths: Sequence[int]
) -> StepPlan:
    """Workers are (micro-step, rank) pairs, a micro-step's ranks side by side."""
    try:
        dealt = assign_bags(
            [lengths[slide] for slide in slides],
            layout.groups * layout.micro_steps,
            cost=stacking.cost,
            max_tiles=stacking.max_tiles_per_rank,
            balance=stacking.balance,
        )
    except OverCapError as error:
        raise OverCapError(None if error.bag is None else slides[error.bag], str(error)) from error
    owned = [tuple(slides[index] for index in own) for own in dealt]
    groups = layout.groups
    return StepPlan(tuple(tuple(owned[micro * groups : (micro + 1) * groups]) for micro in range(layout.micro_steps)))


def _deal(slides: Sequence[int], layout: StepLayout) -> StepPlan:
    per_group = [tuple(slides[group :: layout.groups]) for group in range(layout.groups)]
    size = layout.bags_per_group
    return StepPlan(
        tuple(tuple(own[micro * size : (micro + 1) * size] for own in per_group) for micro in range(layout.micro_steps))
    )


def choose_tiles(n_tiles: int, wanted: int | None, key: tuple[int, int, int]) -> tuple[int, ...] | None:
    """Rows of a slide's grid to train on: `wanted` of them at random, in their order, none twice; None for all.

    Args:
        n_tiles: tiles of the slide; fewer than wanted are all taken.
        wanted: tiles per slide, or None.
        key: (seed, epoch, slide): nothing else decides, so that any number of ranks trains on the same tiles.
    """
    if wanted is None or wanted >= n_tiles:
        return None
    generator = torch.Generator().manual_seed(slide_seed(*key) ^ 0x5EED)  # not the draw of the augmentation
    return tuple(sorted(torch.randperm(n_tiles, generator=generator)[:wanted].tolist()))


def share_tiles(lengths: Sequence[int], shares: Sequence[float]) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Deal the tiles of several bags, one after the other, to ranks: each gets one stretch, in proportion to its share.

    Args:
        lengths: tiles of each bag.
        shares: one per rank, relative to each other; equal ones differ by at most one tile over all bags together.

    Returns:
        Per rank and bag, (start, stop) among the bag's tiles; an empty stretch where the rank has none of it.
    """
    total, whole = sum(lengths), sum(shares)
    cuts = [0, *(round(total * done / whole) for done in accumulate(shares))]
    bounds = [0, *accumulate(lengths)]
    return tuple(
        tuple(
            (min(max(low, first), last) - first, min(max(high, first), last) - first)
            for first, last in pairwise(bounds)
        )
        for low, high in pairwise(cuts)
    )


def deal_by_cost(costs: Sequence[int], world_size: int) -> tuple[tuple[int, ...], ...]:
    """Deal items to ranks, the costliest first and to the least loaded rank: for evaluation, where order is free."""
    loads = [0] * world_size
    dealt: list[list[int]] = [[] for _ in range(world_size)]
    for item in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        rank = loads.index(min(loads))
        loads[rank] += costs[item]
        dealt[rank].append(item)
    return tuple(tuple(sorted(items)) for items in dealt)
