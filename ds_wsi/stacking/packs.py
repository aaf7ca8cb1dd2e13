"""A stack in packs that stay in the cache: whole bags, as many as fit, one pack after the other."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.stacking.randomness import stack_bounds
from ds_wsi.stacking.stacked_bags import StackedBags, bounds_of, lengths_of, with_bounds


def plan_packs(lengths: Sequence[int], max_rows: int) -> list[tuple[int, int]]:
    """Consecutive bags [first, last) of at most `max_rows` rows together; a longer bag is a pack of its own."""
    packs, first, rows = [], 0, 0
    for index, length in enumerate(lengths):
        if index > first and rows + length > max_rows:
            packs.append((first, index))
            first, rows = index, 0
        rows += length
    return [*packs, (first, len(lengths))]


class PackedForward:
    """An aggregator's forward, a pack at a time; the outputs are those of the stack."""

    def __init__(self, original: Callable[..., Any], pack_bytes: int) -> None:
        self.original, self.pack_bytes = original, pack_bytes

    def __call__(self, bags: StackedBags, *more: Any) -> Any:
        """See the class; `more` are labels int64 [B]."""
        if not self.pack_bytes:
            with stack_bounds(bags.cu_seqlens):
                return self.original(bags, *more)
        row_bytes = bags.values[:1].numel() * bags.values.element_size() or 1
        packs = plan_packs(lengths_of(bags.cu_seqlens), max(1, self.pack_bytes // row_bytes))
        outputs, bounds = [], bounds_of(bags.cu_seqlens)
        for first, last in packs:
            start = bounds[first]
            pack_bounds = with_bounds(
                bags.cu_seqlens[first : last + 1] - start, [bound - start for bound in bounds[first : last + 1]]
            )
            part = StackedBags(bags.values[start : bounds[last]], pack_bounds)
            with stack_bounds(part.cu_seqlens, first):
                outputs.append(self.original(part, *(None if one is None else one[first:last] for one in more)))
        return type(outputs[0])(*(_joined(parts) for parts in zip(*outputs, strict=True)))


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if len(present) == len(parts) else None


def pack_bags(aggregator: nn.Module, pack_bytes: int) -> Callable[[], None]:
    """Let an aggregator compute its stacks in packs, in place; returns what undoes it.

    Args:
        aggregator: takes a StackedBags and returns a named tuple of tensors by bag or by instance.
        pack_bytes: bytes of a pack's instances; 0 takes the stack whole.
    """
    before = aggregator.__dict__.get("forward")
    aggregator.forward = PackedForward(aggregator.forward, pack_bytes)

    def undo() -> None:
        if before is None:
            del aggregator.__dict__["forward"]
        else:
            aggregator.forward = before

    return undo
