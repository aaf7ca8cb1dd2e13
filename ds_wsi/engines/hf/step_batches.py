"""The bags of the HF Trainer's micro-steps: dealt by `plan_epoch`, and what a rank without one computes."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds_wsi.bags.sampler import plan_epoch
from ds_wsi.bags.step_layout import StepLayout
from ds_wsi.config import SECTION
from ds_wsi.runtime.contracts import HasLengths
from ds_wsi.stacking.policy import StackingPolicy


class StepBatches:
    """This rank's bags of an epoch, one list per micro-step, by `plan_epoch`: every bag once; empty where it has none.

    Args:
        n_bags: the data set's bags.
        seed: the seed of the order.
        rank, world_size: this process's rank, and the number of ranks.
        bags_per_rank, accumulation: bags per rank and micro-step, and micro-steps per step.
        drop_last: leave a short last step out.
        stacking: deals where it says so.
        lengths: tiles of each bag, for such a policy.
    """

    def __init__(
        self,
        n_bags: int,
        *,
        seed: int,
        rank: int,
        world_size: int,
        bags_per_rank: int,
        accumulation: int,
        drop_last: bool = False,
        stacking: StackingPolicy | None = None,
        lengths: Sequence[int] = (),
    ) -> None:
        self.rank, self.accumulation, self.epoch = rank, accumulation, 0
        layout = StepLayout(world_size, bags_per_rank, accumulation, stacking)
        self.bags_per_step = layout.bags_per_step
        self.n_steps = layout.steps_per_epoch(n_bags)
        if drop_last:
            self.n_steps = n_bags // self.bags_per_step
        if self.n_steps == 0:
            raise ValueError(
                f"the data set must hold a step's bags, {self.bags_per_step if drop_last else 1}, got {n_bags}. "
                "HINT: dataloader_drop_last=False"
            )
        self._plan = partial(plan_epoch, n_bags, layout, seed=seed, lengths=lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by Accelerate and the Trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-steps."""
        return self.n_steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        """Rows of the data set."""
        for step in self._plan(epoch=self.epoch)[: self.n_steps]:
            for ranks in step.micro_steps:
                yield list(ranks[self.rank])


class OrIdle:
    """A collator that knows what a rank without a bag computes: one tile of the data set's first bag, no label."""

    def __init__(self, collate: Callable[[Sequence[Any]], dict[str, Tensor]], dataset: Any) -> None:
        self.collate = collate
        first = collate([dataset[0]])
        if not {"labels", "cu_seqlens", "values"} <= set(first):
            raise ValueError(
                f"a training batch must hold labels, cu_seqlens and values, got {sorted(first)}. "
                'HINT: items need "labels", and a "tiles" or "features"'
            )
        self.idle = {
            "labels": first["labels"][:0],
            "cu_seqlens": torch.tensor([0, 1]),
            "values": first["values"][:1].clone(),
        }

    def __call__(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """The items' batch, or the idle one."""
        return self.collate(items) if len(items) else self.idle


def bag_lengths(dataset: Any, column: str) -> list[int]:
    """Tiles of each bag: the data set's attribute `lengths`, or its column of that name.

    Raises:
        ValueError: it has neither.
    """
    lengths: Any = dataset.lengths if isinstance(dataset, HasLengths) else None
    if lengths is None and column in (getattr(dataset, "column_names", None) or ()):
        lengths = dataset[column]
    if lengths is None:
        raise ValueError(
            f"{SECTION}.stacking deals bags by their lengths: train_dataset must have an attribute lengths, or a "
            f"column {column!r}, got neither. HINT: length_column_name names the column"
        )
    return [int(length) for length in lengths]
