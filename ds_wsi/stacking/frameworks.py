"""What lossless stacking is compared with: bags padded to the longest, and bags sampled to one length."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.runtime.contracts import Pools
from ds_wsi.runtime.forwards import Handle
from ds_wsi.stacking.stacked_bags import StackedBags, bounds_on


def sample_bag(bag: Tensor, wanted: int, key: int) -> Tensor:
    """`wanted` instances of a bag [N, ...], in order: without repeats where there are as many, else with."""
    return bag[sample_rows(len(bag), wanted, key).to(bag.device)]


def sample_rows(count: int, wanted: int, key: int) -> Tensor:
    """The instances that `sample_bag` takes of `count`: int64 [wanted], ascending."""
    generator = torch.Generator().manual_seed(key % 2**63)
    if count >= wanted:
        rows = torch.randperm(count, generator=generator)[:wanted]
    else:
        rows = torch.randint(0, count, (wanted,), generator=generator)
    return rows.sort().values


class PaddedForward:
    """An aggregator's forward on bags padded with zeros to the longest of the stack, as [B, N, D] batches are.

    Aggregators that pool get a mask, which hides the padding from the softmax, but not from the clock. Others see the
    zeros as instances: that is what padding does to them.
    """

    def __init__(self, aggregator: Any, output: Callable[..., Any]) -> None:
        self.aggregator, self.output = aggregator, output
        self.original: Callable[..., Any] = aggregator.forward

    def __call__(self, bags: StackedBags, *more: Any) -> Any:
        """See the class; attention is of the instances that are no padding, [sum N]."""
        parts = bags.split()
        padded = nn.utils.rnn.pad_sequence(list(parts), batch_first=True)  # [B, N, D]
        n_bags, longest = padded.shape[:2]
        lengths = bags.lengths
        real = torch.arange(longest, device=lengths.device) < lengths.unsqueeze(1)  # [B, N]
        flat = padded.flatten(0, 1)
        pools = isinstance(self.aggregator, Pools)
        if not pools or more:
            bounds = bounds_on(lengths.device, [longest] * n_bags)
            out = self.original(StackedBags(flat, bounds), *more)
            return out if out.attention is None else out._replace(attention=out.attention[real.flatten()])
        kind, embedded = self.aggregator.pooling, self.aggregator.embed(flat)
        width = embedded.shape[1]
        if kind == "attention":
            scores = self.aggregator.scores(embedded).view(n_bags, longest, -1)
            weights = scores.masked_fill(~real.unsqueeze(2), float("-inf")).softmax(1)  # [B, N, M]
            pooled = weights.transpose(1, 2) @ embedded.view(n_bags, longest, width)
            return self.output(self.aggregator.head(pooled), weights[real].squeeze(-1))
        grid = embedded.view(n_bags, longest, width)
        if kind == "max":
            pooled = grid.masked_fill(~real.unsqueeze(2), float("-inf")).amax(1)
        else:
            pooled = (grid * real.unsqueeze(2)).sum(1) / lengths.unsqueeze(1)
        return self.output(self.aggregator.head(pooled.unsqueeze(1)), None)


def pad_bags(aggregator: nn.Module, output: Callable[..., Any]) -> Handle[PaddedForward]:
    """Let an aggregator compute padded stacks, in place; `output` makes (logits, attention).

    Returns:
        A handle; `handle.remove()` undoes it.
    """
    return Handle(aggregator, PaddedForward(aggregator, output), "padding")
