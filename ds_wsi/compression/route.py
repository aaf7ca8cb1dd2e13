"""The way of one bucket: how it is cut, between whom it goes, and what its messages hold."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from ds_wsi.compression.exchange import Ranks, even_bounds
from ds_wsi.compression.policy import DMGC, TopK
from ds_wsi.compression.selection import Selection, Span, apply, bytes_by_tensor, layout_of, pieces_of, sections_of
from ds_wsi.compression.wire import Section, WireError, decode, encode


@dataclass(frozen=True)
class Bucket:
    """A flat buffer that parameters share.

    Attributes:
        buffer: [sum of numels], any floating dtype.
        names, numels: the parameters', in the order in which they lie in the buffer; the same on all ranks.
        group: the group to exchange with; None: the default one.
    """

    buffer: Tensor
    names: Sequence[str]
    numels: Sequence[int]
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Route:
    """How a bucket is cut, between whom it goes, and how values are sent.

    Attributes:
        shards: (start, stop) of each owner's; one, of everything, where all ranks get the same message.
    """

    bucket: Bucket
    ranks: Ranks
    spans: Sequence[Span]
    shards: Sequence[tuple[int, int]]
    values: str
    step: int

    def pieces(self, number: int) -> list[Span]:
        """The pieces of a shard."""
        return pieces_of(self.spans, *self.shards[number])

    def sections(self, sent: Selection, number: int, origin: int = 0) -> list[Section]:
        """The sections of a shard, from a selection whose indices count from `origin` of the bucket."""
        return sections_of(sent, self.pieces(number), self.shards[number][0] - origin)

    def message(self, sections: Sequence[Section], number: int, flags: int = 0) -> Tensor:
        """Empty for a shard without entries: no message is sent."""
        if not sections:
            return torch.empty(0, dtype=torch.uint8)
        source = self.ranks.rank
        return encode(sections, step=self.step, source=source, shard=number, flags=flags, values=self.values)

    def read(self, message: Tensor, number: int, into: Tensor, flags: int = 0) -> list[Section]:
        """Add a message of a shard to `into`, the shard; returns what it held.

        Raises:
            WireError: torn, or of another step, shard or kind than this rank is at.
        """
        pieces = self.pieces(number)
        if not pieces:
            return []
        decoded = decode(message, layout=layout_of(pieces), step=self.step)
        if (decoded.shard, decoded.flags) != (number, flags):
            raise WireError(f"a message must be of shard {number}, flags {flags}, got {decoded.shard}, {decoded.flags}")
        apply(decoded, pieces, into)
        return list(decoded.sections)

    def bytes_by_tensor(self, by_shard: Iterable[Sequence[Section]]) -> Counter[str]:
        """Payload bytes of the shards' messages by parameter."""
        total: Counter[str] = Counter()
        for number, sections in enumerate(by_shard):
            start = self.shards[number][0]
            names, numels = self.bucket.names, self.bucket.numels
            total.update(bytes_by_tensor(sections, self.pieces(number), start, names, numels, self.values))
        return total


def topology_of(policy: TopK | DMGC) -> str:
    """Where a policy's messages go."""
    return policy.topology if isinstance(policy, DMGC) else "all_gather"


def bounds_of(topology: str, d: int, ranks: int) -> tuple[int, ...]:
    """Where each rank's shard of a bucket begins, and the end; `server`: all is rank 0's."""
    return even_bounds(d, ranks) if topology == "sharded" else (0, *[d] * ranks)


def shards_of(policy: TopK, bucket: Bucket, ranks: Ranks, bounds: Sequence[int] | None) -> list[tuple[int, int]]:
    """(start, stop) of each owner's shard, checked; `bounds` None: `bounds_of`."""
    d = bucket.buffer.numel()
    bounds = bounds_of(topology_of(policy), d, ranks.size) if bounds is None else bounds
    if len(bounds) != ranks.size + 1 or (bounds[0], bounds[-1]) != (0, d) or list(bounds) != sorted(bounds):
        raise ValueError(f"bounds must rise from 0 to {d}, {ranks.size + 1} of them, got {tuple(bounds)}")
    return list(pairwise(bounds))
