"""What a bag draws (dropout, masks, splits) keyed by the bag: the same wherever it is computed, and with whom.

`bag_randomness(keys)` goes around a model's forward. Inside, whoever computes bag by bag draws under
`bag_draws(index)`, and the dropouts that `key_dropouts` changed draw each bag's rows from its own key. Outside, nothing
is different.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.runtime.log import logger
from ds_wsi.runtime.seeding import keyed_generators
from ds_wsi.stacking.stacked_bags import lengths_of


@dataclass
class _Bags:
    """Keys of the bags in the present forward, their lengths once known, and how often each dropout was called."""

    keys: Sequence[int]
    lengths: Sequence[int] | None = None
    part: int = 0  # of a bag that lies on several ranks: its rows there draw from a key of their own
    calls: Counter[int] = field(default_factory=Counter)


_present: ContextVar[_Bags | None] = ContextVar("ds_wsi bags", default=None)
_MIX = 0x9E3779B97F4A7C15


@contextmanager
def bag_randomness(keys: Sequence[int], part: int = 0) -> Iterator[None]:
    """Key what is drawn inside by bag.

    Args:
        keys: one per bag of the stack, in order: (seed, step, bag id) mixed into one number each.
        part: the part of the bags that this rank has.
    """
    token = _present.set(_Bags(keys, part=part))
    try:
        yield
    finally:
        _present.reset(token)


@contextmanager
def stack_bounds(cu_seqlens: Tensor, first_bag: int = 0) -> Iterator[None]:
    """Say which rows belong to which bag, for the dropouts inside; `first_bag` of the stack is the first here."""
    bags = _present.get()
    if bags is None:
        yield
        return
    lengths = lengths_of(cu_seqlens)
    keys = bags.keys[first_bag : first_bag + len(lengths)]
    # A stack within the stack (pseudo-bags) goes on counting; a pack starts anew, as if it were alone.
    calls = Counter() if bags.lengths is None else bags.calls
    token = _present.set(replace(bags, keys=keys, lengths=lengths, calls=calls))
    try:
        yield
    finally:
        _present.reset(token)


@contextmanager
def bag_draws(index: int, device: torch.device) -> Iterator[None]:
    """Draw for one bag of the stack from torch's generators, seeded with its key; elsewhere as it is."""
    bags = _present.get()
    if bags is None:
        yield
        return
    token = _present.set(None)  # what draws inside draws from the generators
    try:
        with keyed_generators((bags.keys[index] + bags.part * _MIX) % 2**63, device):
            yield
    finally:
        _present.reset(token)


class _KeyedDropout(nn.Dropout):
    """What `key_dropouts` puts before nn.Dropout's own forward."""

    def forward(self, input: Tensor) -> Tensor:
        bags = _present.get()
        if bags is None or bags.lengths is None or not self.training or self.p == 0:
            return super().forward(input)
        rows = input.shape[0]
        if rows == sum(bags.lengths):
            lengths, part = bags.lengths, bags.part
        elif rows == len(bags.lengths):
            lengths, part = [1] * rows, 0  # of whole bags: alike on all ranks that share them
        else:
            _warn_once(type(self).__name__, rows)
            return super().forward(input)
        number = self.__dict__["place"] + 1_000 * bags.calls[id(self)]
        bags.calls[id(self)] += 1
        generator = torch.Generator(device=input.device)
        kept = []
        for key, length in zip(bags.keys, lengths, strict=True):
            generator.manual_seed((key + (number + 1) * _MIX + part * 7919) % 2**63)
            kept.append(torch.rand(length, *input.shape[1:], device=input.device, generator=generator) >= self.p)
        return input * torch.cat(kept) / (1 - self.p)


@cache
def _warn_once(name: str, rows: int) -> None:
    logger.warning("%s of %d rows is neither of instances nor of bags: its draw is not keyed by bag", name, rows)


def key_dropouts(module: nn.Module) -> list[nn.Module]:
    """Let the dropouts of an aggregator draw by bag inside `bag_randomness`, in place; they are returned."""
    changed: list[Any] = [part for part in module.modules() if type(part) is nn.Dropout]
    for number, part in enumerate(changed):
        part.__class__ = _KeyedDropout
        part.__dict__["place"] = number
    return changed
