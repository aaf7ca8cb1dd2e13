"""The slides of a cohort over several processes: who begins with which, and the one summary of what all have done."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_wsi.bags.sampler import deal_by_cost
from ds_wsi.runtime.files import write_text
from ds_wsi.runtime.own_files import begins_with, require_ours
from ds_wsi.runtime.shards import Shard


def shard_order(costs: Sequence[int], shard: Shard) -> list[int]:
    """All items, in the order in which this shard takes those that are free.

    Its own stand first, the costliest in front; then the others', from the cheap ends, where their owners are last. One
    process keeps the items' own order.

    Args:
        costs: each item's cost, such as its tiles or bytes; the same on all shards.
        shard: this process.
    """
    if shard.is_alone:
        return list(range(len(costs)))
    dealt = deal_by_cost(costs, shard.count)
    first, *others = (
        sorted(dealt[(shard.index + step) % shard.count], key=lambda item: (-costs[item], item))
        for step in range(shard.count)
    )
    return first + [item for share in others for item in reversed(share)]


def own_items(costs: Sequence[int], shard: Shard) -> frozenset[int]:
    """The items that a shard begins with: those of all shards are all, each once."""
    return frozenset(deal_by_cost(costs, shard.count)[shard.index])


class SummaryFile:
    """A table with a row per slide, made of the files alone: the same bytes whoever writes it.

    Args:
        path: the CSV.
        columns: the first line, which tells a file of an earlier call from a stranger's.

    Raises:
        ValueError: a file of something else has the name.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self._columns = path, tuple(columns)
        require_ours(path, lambda there: begins_with(there, ",".join(columns)), "the folder of the results")

    def holds(self, rows: Sequence[Sequence[Any]]) -> bool:
        """Whether it is there with these rows: another process, or an earlier call, has written it."""
        return self.path.is_file() and self.path.read_text(encoding="utf-8") == self._text(rows)

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        """Write it, atomically, when all slides are done; nothing where it holds these rows."""
        if not self.holds(rows):
            write_text(self.path, self._text(rows))

    def _text(self, rows: Sequence[Sequence[Any]]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self._columns, *rows])
        return text.getvalue()
