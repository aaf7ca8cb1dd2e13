"""The entries of a flat bucket that are sent, and their way into and out of messages, shard by shard.

A bucket is cut into spans: runs of parameters that are sent whole, and runs of which the largest entries are sent. What
is selected does not depend on the number of ranks; only then is the bucket cut at the shards' bounds. The parts of
spans within one shard are its pieces, a message's sections. Sender and receiver compute them alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ds_wsi.compression.meter import share
from ds_wsi.compression.topk import nonzero, top_k
from ds_wsi.compression.wire import ABSOLUTE, Message, Section, cheapest, section_bytes


@dataclass(frozen=True)
class Span:
    """Entries `start`..`stop` of a bucket, number `id`; `whole`: all are sent."""

    id: int
    start: int
    stop: int
    whole: bool


@dataclass(frozen=True)
class Selection:
    """What is sent of a bucket.

    Attributes:
        indices: [n] int64, ascending; None: everything.
        values: [n] float32.
    """

    indices: Tensor | None
    values: Tensor

    def between(self, start: int, stop: int) -> tuple[Tensor | None, Tensor]:
        """The part in `start`..`stop`, with indices from 0."""
        if self.indices is None:
            return None, self.values[start:stop]
        ends = torch.tensor([start, stop], device=self.indices.device)
        first, last = torch.searchsorted(self.indices, ends).tolist()
        return self.indices[first:last] - start, self.values[first:last]


def spans_of(numels: Sequence[int], dense_below: int) -> list[Span]:
    """Runs of parameters below and from `dense_below` entries; parameters without entries are in none."""
    spans: list[Span] = []
    start = 0
    for numel in numels:
        whole = numel < dense_below
        if numel and spans and spans[-1].whole == whole:
            spans[-1] = Span(spans[-1].id, spans[-1].start, start + numel, whole)
        elif numel:
            spans.append(Span(len(spans), start, start + numel, whole))
        start += numel
    return spans


def pieces_of(spans: Sequence[Span], start: int, stop: int) -> list[Span]:
    """The spans' parts in `start`..`stop`, their positions from there."""
    cut = [Span(s.id, max(s.start, start) - start, min(s.stop, stop) - start, s.whole) for s in spans]
    return [piece for piece in cut if piece.start < piece.stop]


def kept(numel: int, keep: float) -> int:
    """How many of `numel` entries the ratio keeps: the nearest integer, 1 at least."""
    return min(numel, max(1, int(keep * numel + 0.5)))


def select(flat: Tensor, spans: Sequence[Span], keep: float) -> Selection:
    """The largest entries of each span, or all of it."""
    counts = [s.stop - s.start if s.whole else kept(s.stop - s.start, keep) for s in spans]
    if sum(counts) == len(flat):
        return Selection(None, flat)
    chosen = [top_k(flat[s.start : s.stop], count) + s.start for s, count in zip(spans, counts)]
    indices = torch.cat(chosen) if len(chosen) > 1 else chosen[0]
    return Selection(indices, flat[indices])


def select_nonzero(flat: Tensor) -> Selection:
    """All entries but zeros: nothing is lost."""
    indices = nonzero(flat)
    return Selection(indices, flat[indices])


def sections_of(selection: Selection, pieces: Sequence[Span], start: int) -> list[Section]:
    """A message's sections from a selection, of the shard's pieces that begins at `start`."""
    parts = [(piece, selection.between(start + piece.start, start + piece.stop)) for piece in pieces]
    return [Section(piece.id, piece.stop - piece.start, *part) for piece, part in parts]


def layout_of(pieces: Sequence[Span]) -> list[tuple[int, int]]:
    """What a receiver expects of the pieces: id and size of each."""
    return [(piece.id, piece.stop - piece.start) for piece in pieces]


def apply(message: Message, pieces: Sequence[Span], shard: Tensor) -> None:
    """Add a message to a shard in place, or put its values there if it says so.

    Indices in a message are distinct, so this is deterministic on a GPU too, which scatter_add is not.
    """
    for section, piece in zip(message.sections, pieces, strict=True):
        into, values = shard[piece.start : piece.stop], section.values.to(shard.device)
        if section.indices is None:
            into.copy_(values if message.flags & ABSOLUTE else into + values)
        else:
            indices = section.indices.to(shard.device)
            into[indices] = values if message.flags & ABSOLUTE else into[indices] + values


def bytes_by_tensor(
    sections: Sequence[Section],
    pieces: Sequence[Span],
    start: int,
    names: Sequence[str],
    numels: Sequence[int],
    values: str,
) -> dict[str, int]:
    """Payload bytes of a shard's message by parameter: each section's in proportion to the entries sent."""
    sizes = dict.fromkeys(names, 0)
    offsets = torch.tensor(list(accumulate(numels, initial=0)))
    for section, piece in zip(sections, pieces, strict=True):
        d, nnz = section.numel, len(section.values)
        ends = (offsets - (start + piece.start)).clamp(0, d)
        if section.indices is not None:
            ends = torch.searchsorted(section.indices.cpu(), ends)
        size = section_bytes(cheapest(values, d, nnz), values, d, nnz)
        for name, part in zip(names, share(size, ends.diff().tolist())):
            sizes[name] += part
    return sizes
