"""What a micro-step computes on: its bags, laid in one stack on the host or the device."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_wsi.bags.augment import augmentation
from ds_wsi.bags.bag import Bag
from ds_wsi.runtime.seeding import step_seed
from ds_wsi.stacking.frameworks import sample_bag
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
    """

    bags: list[Bag]
    keys: list[int]
    tiles: list[Tensor]
    stack: Tensor | None = None


def lay_bags(run: RunContext, bags: list[Bag], step: int) -> MicroStep:
    """A micro-step of optimizer step `step` of the run, its tiles on the way to where they are encoded."""
    stacking = run.settings.policies.stacking
    keys = [step_seed(run.seed, step, bag.slide) for bag in bags]
    tiles = [bag.tiles for bag in bags]
    if stacking.framework == "sampling":
        tiles = [sample_bag(bag, stacking.sample_tiles, key) for bag, key in zip(tiles, keys, strict=True)]
    if not sum(map(len, tiles)):
        return MicroStep(bags, keys, tiles)
    stack = run.stacks.lay(tiles) if run.stacks.lays_anew or run.reads_host_tiles else None
    if stack is None or run.reads_host_tiles:
        return MicroStep(bags, keys, tiles, stack)
    with naming_no_memory("the copy of whole bags to it", run.module.encoder, run.device):
        whole = stack.to(run.device, non_blocking=True)
    return MicroStep(bags, keys, list(whole.split([len(bag) for bag in tiles])))


def stack_of(run: Run, step: MicroStep) -> StackedBags:
    """The bags as the model takes them: augmented on the device, whole or chunk by chunk."""
    slides, lengths = [bag.slide for bag in step.bags], [len(bag) for bag in step.tiles]
    if run.cohort.in_dim is not None:
        return stack_bags([bag.to(run.device) for bag in step.tiles], allow_empty=run.mesh.tile_size > 1)
    changes = [augmentation(run.settings.policies.augment, (run.seed, run.progress.epoch, slide)) for slide in slides]
    if step.stack is not None:
        values: Any = HostTiles(step.stack, lengths, changes)
        return StackedBags(values, bounds_on(run.device, lengths))
    on_device = [bag.to(run.device) for bag in step.tiles]
    changed = [change(bag) for change, bag in zip(changes, on_device, strict=True)]
    return stack_bags(changed, allow_empty=run.mesh.tile_size > 1)


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers, int64 [N] on a device; the CPU does not wait for what the device computes."""
    # From memory that is not page-locked they are staged before the call returns.
    return torch.tensor(list(numbers), dtype=torch.int64).to(device, non_blocking=True)
