"""What a micro-step computes on: its bags, laid in one stack on the host or the device."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_wsi.bags.augment import augmentation
from ds_wsi.bags.bag import Bag
from ds_wsi.bags.joined import scales_of, stretches
from ds_wsi.runtime.seeding import step_seed
from ds_wsi.stacking.frameworks import sample_rows
from ds_wsi.stacking.host_tiles import HostTiles
from ds_wsi.stacking.stacked_bags import StackedBags, bounds_on, stack_bags
from ds_wsi.training.context import RunContext
from ds_wsi.training.out_of_memory import naming_no_memory
from ds_wsi.training.run import Run


class MicroStep(NamedTuple):
    """A micro-step's bags.

    Attributes:
        bags: this rank's, as they were read.
        keys: the key of each bag's random numbers.
        tiles: those of each bag that are trained on: on the host, or on their way to the device where that takes
            stacks as a whole.
        stack: all of them, page-locked, where the encoder reads chunks of a stack on the host.
        rows: those of each bag's grid that `tiles` are of.
    """

    bags: list[Bag]
    keys: list[int]
    tiles: list[Tensor]
    stack: Tensor | None = None
    rows: Sequence[Tensor] = ()


def lay_bags(run: RunContext, bags: list[Bag], step: int) -> MicroStep:
    """A micro-step of optimizer step `step` of the run, its tiles on the way to where they are encoded."""
    stacking = run.settings.policies.stacking
    keys = [step_seed(run.seed, step, bag.slide) for bag in bags]
    tiles, rows = [bag.tiles for bag in bags], [bag.kept for bag in bags]
    if stacking.framework == "sampling":
        sampled = [sample_rows(len(bag), stacking.sample_tiles, key) for bag, key in zip(tiles, keys, strict=True)]
        tiles = [bag[chosen] for bag, chosen in zip(tiles, sampled, strict=True)]
        rows = [kept[chosen] for kept, chosen in zip(rows, sampled, strict=True)]
    if not sum(map(len, tiles)):
        return MicroStep(bags, keys, tiles, rows=rows)
    stack = run.stacks.lay(tiles) if run.stacks.lays_anew or run.reads_host_tiles else None
    if stack is None or run.reads_host_tiles:
        return MicroStep(bags, keys, tiles, stack, rows)
    with naming_no_memory("the copy of whole bags to it", run.module.encoder, run.device):
        whole = stack.to(run.device, non_blocking=True)
    return MicroStep(bags, keys, list(whole.split([len(bag) for bag in tiles])), rows=rows)


def stack_of(run: Run, step: MicroStep) -> StackedBags:
    """The bags as the model takes them: augmented on the device, whole or chunk by chunk; one draw per slide."""
    if run.cohort.in_dim is not None:
        return stack_bags([bag.to(run.device) for bag in step.tiles], allow_empty=run.mesh.tile_size > 1)
    grids, policy, epoch = run.cohort.grids, run.settings.policies.augment, run.progress.epoch
    each = [stretches(grids[bag.slide], bag.slide, rows) for bag, rows in zip(step.bags, step.rows, strict=True)]
    changes = [[augmentation(policy, (run.seed, epoch, number)) for number, _ in of_bag] for of_bag in each]
    if step.stack is not None:
        lengths = [count for of_bag in each for _, count in of_bag]
        values: Any = HostTiles(step.stack, lengths, [change for of_bag in changes for change in of_bag])
        return StackedBags(values, bounds_on(run.device, map(len, step.tiles)))
    on_device = [bag.to(run.device) for bag in step.tiles]
    changed = [
        _changed(bag, of_bag, [count for _, count in lengths])
        for bag, of_bag, lengths in zip(on_device, changes, each, strict=True)
    ]
    return stack_bags(changed, allow_empty=run.mesh.tile_size > 1)


def _changed(bag: Tensor, changes: Sequence[Callable[[Tensor], Tensor]], lengths: Sequence[int]) -> Tensor:
    """A bag whose slides' tiles, one stretch after the other, are changed by their own draws."""
    parts = [change(part) for change, part in zip(changes, bag.split(list(lengths)), strict=True)]
    return parts[0] if len(parts) == 1 else _with_strides_of(parts, bag)


def _with_strides_of(parts: Sequence[Tensor], bag: Tensor) -> Tensor:
    """The parts as one tensor, in the bag's order of memory."""
    whole = torch.empty_like(bag)
    start = 0
    for part in parts:
        whole[start : start + len(part)].copy_(part)
        start += len(part)
    return whole


def scales_of_stack(run: RunContext, step: MicroStep) -> Tensor:
    """The magnification of each tile of a micro-step, int64 [sum N] on the device."""
    grids = run.cohort.grids
    each = [scales_of(grids[bag.slide], rows) for bag, rows in zip(step.bags, step.rows, strict=True)]
    return torch.cat(each).to(run.device, non_blocking=True)


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers, int64 [N] on a device; the CPU does not wait for what the device computes."""
    # From memory that is not page-locked they are staged before the call returns.
    return torch.tensor(list(numbers), dtype=torch.int64).to(device, non_blocking=True)
