"""Bytes that compression puts on the wire, against those of dense float32 gradients.

[Note: two counts]
Message bytes are those of what a rank encodes (push) or reads (pull) for all d values of a bucket, its own shard
included: against 4d they say how well it is compressed. Wire bytes are those that cross between ranks, headers and
announced lengths included. Pushes count at the sender and pulls at the receiver, so the sum over the ranks is the
traffic.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

DIRECTIONS = ("push", "pull")


@dataclass
class Direction:
    """What went one way.

    Attributes:
        messages: [messages] (bytes, bytes of the same as dense float32), in order of time.
        by_tensor: message bytes by parameter name; headers and tables are of none.
        dense_by_tensor: 4 numel of each, every time.
        wire_bytes: bytes across ranks.
    """

    messages: list[tuple[int, int]] = field(default_factory=list)
    by_tensor: Counter[str] = field(default_factory=Counter)
    dense_by_tensor: Counter[str] = field(default_factory=Counter)
    wire_bytes: int = 0

    @property
    def message_bytes(self) -> int:
        """Bytes of all messages."""
        return sum(size for size, _ in self.messages)


class ByteCount:
    """Counts one rank's traffic by direction, "push" and "pull"."""

    def __init__(self) -> None:
        self.push, self.pull = Direction(), Direction()
        self._at_target: int | None = None

    def record(
        self,
        direction: str,
        *,
        message_bytes: int,
        wire_bytes: int,
        numels: Mapping[str, int],
        by_tensor: Mapping[str, int],
    ) -> None:
        """Count one message (to or from all owners together) of a bucket of `numels`."""
        way = self._way(direction)
        way.messages.append((message_bytes, 4 * sum(numels.values())))
        way.wire_bytes += wire_bytes
        way.by_tensor.update(by_tensor)
        way.dense_by_tensor.update({name: 4 * numel for name, numel in numels.items()})

    def message_ratio(self, direction: str, last: int | None = None) -> float:
        """M1: mean bytes of the last messages (None: all) / 4d.

        Raises:
            ValueError: no message yet, or `last` below 1.
        """
        if last is not None and last < 1:
            raise ValueError(f"a window must have at least 1 message, got {last}")
        window = self._way(direction).messages[-(last or 0) :]
        if not window:
            raise ValueError(f"a ratio needs a message, got none ({direction})")
        return sum(size for size, _ in window) / max(sum(dense for _, dense in window), 1)

    @property
    def wire_bytes(self) -> int:
        """Both ways."""
        return self.push.wire_bytes + self.pull.wire_bytes

    def reach_target(self) -> None:
        """Say that the target fixed before the run is met: the wire bytes so far are M2's. Later calls do nothing."""
        if self._at_target is None:
            self._at_target = self.wire_bytes

    @property
    def bytes_to_target(self) -> int | None:
        """Wire bytes when the target was met; None: not met."""
        return self._at_target

    def _way(self, direction: str) -> Direction:
        if direction not in DIRECTIONS:
            raise ValueError(f"a direction must be one of {', '.join(DIRECTIONS)}, got {direction}")
        return self.push if direction == "push" else self.pull


def target_ratio(ours: ByteCount, dense: ByteCount) -> float:
    """M2: wire bytes until the target / those of the dense run until the same target.

    Raises:
        ValueError: one of the two did not meet it.
    """
    if ours.bytes_to_target is None or not dense.bytes_to_target:
        raise ValueError("both runs must meet the target before their bytes are compared")
    return ours.bytes_to_target / dense.bytes_to_target


def share(total: int, weights: Sequence[int]) -> list[int]:
    """Integers in the proportion of `weights` that sum to `total` (to 0 where all weights are 0)."""
    whole, seen, given, parts = sum(weights), 0, 0, []
    for weight in weights:
        seen += weight
        upto = total * seen // whole if whole else 0
        parts.append(upto - given)
        given = upto
    return parts
