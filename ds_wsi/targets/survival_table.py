"""Bags with their risk scores and survival times, as a partial likelihood sees them, from one rank or from all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ds_wsi.targets.sums import single_output


@dataclass(frozen=True, eq=False)
class SurvivalTable:
    """Bags and what is known of their survival; rows in any order.

    Attributes:
        scores: float64 [B], theta: the larger, the sooner the event is expected. Without a graph; on any device.
        times: float64 [B], on the host: of the event or of the censoring, in any unit; NaN: the bag has no target. It
            is in no risk set then, and its gradient is 0.
        events: bool [B], on the host: whether the event was seen at that time; False: censored.
        strata: int64 [B], on the host: risk sets hold bags of one stratum.
        ids: int64 [B], on the host: the bag's number in the cohort, which orders bags of equal times.
    """

    scores: Tensor
    times: Tensor
    events: Tensor
    strata: Tensor
    ids: Tensor

    @classmethod
    def of(
        cls,
        scores: Tensor,
        times: Sequence[float] | Tensor,
        events: Sequence[bool] | Tensor,
        ids: Sequence[int] | Tensor,
        strata: Sequence[int] | Tensor | None = None,
    ) -> "SurvivalTable":
        """The table of scores [B] or [B, 1] of any floating type, which are detached; strata None: all one.

        Raises:
            ValueError: columns of different length, or a time that is not finite and positive.
        """
        theta = single_output(scores.detach()).double()
        columns = (
            torch.as_tensor(times, dtype=torch.float64, device="cpu"),
            torch.as_tensor(events, dtype=torch.bool, device="cpu"),
            torch.as_tensor([0] * len(theta) if strata is None else strata, dtype=torch.int64, device="cpu"),
            torch.as_tensor(ids, dtype=torch.int64, device="cpu"),
        )
        for name, column in zip(("times", "events", "strata", "ids"), columns):
            if column.shape != (len(theta),):
                raise ValueError(
                    f"{name} must be one per score, [{len(theta)}], got {list(column.shape)}. HINT: give the columns "
                    "of the same bags in the same order."
                )
        wrong = torch.nonzero(columns[0].isinf() | (columns[0] <= 0))
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"times must be finite and positive, got {columns[0][row]:g} (bag {columns[3][row]}). HINT: correct "
                "the table, or leave the cell empty where the time is not known."
            )
        return cls(theta, *columns)

    def __len__(self) -> int:
        return len(self.times)

    def to_host(self) -> "SurvivalTable":
        """The same with the scores on the host."""
        return SurvivalTable(self.scores.cpu(), self.times, self.events, self.strata, self.ids)

    def canonical_order(self) -> Tensor:
        """Row numbers by (stratum, time, id), of bags that have a target: int64 [bags with a target], on the host.

        Sums in this order have the same bits on every rank, however the bags were dealt.

        Raises:
            ValueError: an id occurs twice.
        """
        known_rows = torch.nonzero(~self.times.isnan()).reshape(-1)
        ids = self.ids[known_rows]
        values, counts = ids.unique(return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"ids must differ within a step, got {int(values[counts > 1][0])} more than once. HINT: where ranks "
                "share bags, gather over the group that holds each bag once."
            )
        order = known_rows[ids.argsort()]
        for column in (self.times, self.strata):
            order = order[column[order].argsort(stable=True)]
        return order


class GatheredTable(NamedTuple):
    """All ranks' bags.

    Attributes:
        table: bags of rank 0, then of rank 1, and so on; the same on all ranks, on the host.
        rows: where this rank's own are, in the order in which it gave them.
    """

    table: SurvivalTable
    rows: slice


def gather_table(own: SurvivalTable, group: Any = None) -> GatheredTable:
    """All ranks' bags, from each one's: the step's table, of the scores of all stacks of the step.

    Collective: two all-gathers on the scores' device, of 1 number and of 5 max(B_r) numbers of 8 bytes; the second is
    left out by all ranks together where none has a bag. The host waits for both. Nothing is sent without other ranks.

    Args:
        own: this rank's bags; any number, with none it takes part all the same.
        group: the ranks that hold each bag once; None: all of them. Where ranks share bags, a rank's score is its
            tile group's, so it is the group across tile groups: `mesh.get_group("slide")` of `tile_mesh`.
    """
    world = dist.get_world_size(group) if dist.is_initialized() else 1
    if world == 1:
        return GatheredTable(own.to_host(), slice(0, len(own)))
    device = own.scores.device
    counts = _all_gathered(torch.tensor([len(own)], device=device), world, group).reshape(-1).tolist()
    width = max(counts)
    if width == 0:
        return GatheredTable(own.to_host(), slice(0, 0))
    # Bits of float64 as int64: a collective that copies keeps them.
    columns = (own.times.view(torch.int64), own.events.long(), own.strata, own.ids)
    sent = torch.zeros(5, width, dtype=torch.int64, device=device)
    sent[0, : len(own)] = own.scores.view(torch.int64)
    sent[1:, : len(own)] = torch.stack(columns).to(device)
    received = _all_gathered(sent, world, group).cpu()
    kept = [part[:, :count] for part, count in zip(received, counts, strict=True)]
    scores, times, events, strata, ids = torch.cat(kept, dim=1)
    rank = dist.get_rank(group)
    start = sum(counts[:rank])
    # Cloned: torch saves no storage that is viewed as two types.
    scores, times = (column.view(torch.float64).clone() for column in (scores, times))
    table = SurvivalTable(scores, times, events.bool(), strata, ids)
    return GatheredTable(table, slice(start, start + len(own)))


def _all_gathered(sent: Tensor, world: int, group: Any) -> Tensor:
    """What every rank sent, [W, ...], on its device."""
    parts = [torch.empty_like(sent) for _ in range(world)]
    dist.all_gather(parts, sent, group=group)
    return torch.stack(parts)
