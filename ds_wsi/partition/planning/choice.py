"""Modes for the segments of a plan by the sum of their costs: what no other combination beats, whatever the budgets.

A plan is the first of these candidates, in order of time, that fits. Budgets only say what fits, so that a larger one
never leads to a slower plan.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ds_wsi.partition.planning.costs import SegmentCost, SegmentMode
from ds_wsi.partition.planning.rates import Rates
from ds_wsi.partition.planning.simulate import Phase

_STREAM = SegmentMode("stream", True)
_MOVED = SegmentMode("checkpoint", True)  # in which boundaries on the host are simulated
_KEPT = 64  # combinations carried from segment to segment, of those that use host memory and of those that do not
_BLOCK = 32  # rows compared at once
_SUMS = ("kept", "peak", "host", "host_peak", "compute_s", "link_s")
_KEPT_BYTES, _PEAK, _HOST, _HOST_PEAK, _COMPUTE, _LINK = range(len(_SUMS))

Array = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Choice:
    """A mode for each segment, and what they sum to."""

    modes: tuple[SegmentMode, ...]
    peak: float
    host_peak: float
    seconds: float


@dataclass(frozen=True)
class _Group:
    """Combinations for the segments so far that leave their output in the same memory, a row of `_SUMS` each."""

    sums: Array
    modes: list[tuple[SegmentMode, ...]]


def seconds_of(cost: SegmentCost | Phase, rates: Rates) -> float:
    """Seconds of computing."""
    return cost.flops / rates.flops + cost.touched / rates.memory + cost.operations * rates.launch


def overlapped(compute_s: float, link_s: float, *, overlaps: bool) -> float:
    """Seconds of computing and of copying, which go on together or not."""
    return max(compute_s, link_s) if overlaps else compute_s + link_s


def combine(costs: dict[SegmentMode, list[SegmentCost]], rates: Rates, *, overlaps: bool) -> list[Choice]:
    """The best combinations for one chunk size, in order of time.

    Args:
        costs: the costs of every segment, by mode; without those of "checkpoint" with every boundary on the host, no
            boundary lies there.
        rates: the device's rates.
        overlaps: copies run beside the computing.
    """
    places, may_move = _places(costs), _MOVED in costs
    groups = {False: _Group(np.zeros((1, len(_SUMS))), [()])}
    for index in range(len(places)):
        later = sum(other.gradients for other in places[index + 1 :])
        grown: dict[bool, list[_Group]] = {False: [], True: []}
        for host_input, group in groups.items():
            for mode in _modes(costs, host_input=host_input, first=index == 0):
                modes = [(*before, mode) for before in group.modes]
                for host_output in (False, True) if may_move and index + 1 < len(places) else (False,):
                    added = _Added(costs, index, mode, host_input, host_output)
                    grown[host_output].append(_Group(added.to(group.sums, later, rates), modes))
        groups = {key: _best(candidates, overlaps=overlaps) for key, candidates in grown.items() if candidates}
    ends = groups[False]
    choices = [
        Choice(modes, row[_PEAK], row[_HOST_PEAK], overlapped(row[_COMPUTE], row[_LINK], overlaps=overlaps))
        for row, modes in zip(ends.sums.tolist(), ends.modes, strict=True)
    ]
    return unbeaten(choices)


def unbeaten(choices: list[Choice]) -> list[Choice]:
    """Those that no other one beats in time and in both memories, in order of time."""
    best: list[Choice] = []
    for one in sorted(choices, key=lambda choice: (choice.seconds, choice.peak, choice.host_peak)):
        if not any(other.peak <= one.peak and other.host_peak <= one.host_peak for other in best):
            best.append(one)
    return best


def _places(costs: dict[SegmentMode, list[SegmentCost]]) -> list[SegmentCost]:
    """Boundaries and gradients, which are the same in every mode."""
    return next(iter(costs.values()))


def _modes(costs: dict[SegmentMode, list[SegmentCost]], *, host_input: bool, first: bool) -> list[SegmentMode]:
    """The modes of a segment; the module's own input is the caller's."""
    if host_input:
        return [SegmentMode(mode, True) for mode in ("checkpoint", "recompute", "stream")]
    return [mode for mode in costs if not mode.host_input or (first and mode == _STREAM)]


@dataclass(frozen=True)
class _Added:
    """A segment more, in one mode, with its input and its output in one memory each."""

    costs: dict[SegmentMode, list[SegmentCost]]
    index: int
    mode: SegmentMode
    host_input: bool
    host_output: bool

    def to(self, sums: Array, later: float, rates: Rates) -> Array:
        """The sums with this segment; `later`: gradients of later segments, alive in this one's backward."""
        places = _places(self.costs)
        boundary, last = places[self.index], self.index + 1 == len(places)
        streams = self.mode == _STREAM
        cost = self.costs[self.mode if streams else SegmentMode(self.mode.mode)][self.index]
        here, there = (0.0 if self.host_input else boundary.source), (0.0 if self.host_output else boundary.out)
        kept = sums[:, _KEPT_BYTES]
        new = sums.copy()
        new[:, _KEPT_BYTES] += cost.kept + (here if cost.keeps_source else 0)
        forward, backward = cost.forward + here + there, cost.backward + 2 * here + there
        held, extra = cost.host, cost.host_extra
        operations = copied = 0.0
        if streams and not last:
            held -= boundary.out  # its own calls had it there
        if self.host_output:
            held += boundary.out
        if not streams:
            # Gradients of boundaries on the host.
            extra += (boundary.source if self.host_input else 0) + (boundary.out if self.host_output else 0)
            sides = self.host_input + self.host_output
            if sides:
                operations, copied = (sides * amount for amount in self._one_side(last))
            plus = self.costs.get(self.mode) if self.host_input else None
            if plus is not None:
                # The peak of a call with its input on the device may fall where the input's gradient is not all there.
                forward = max(forward, plus[self.index].forward + there)
                backward = max(backward, plus[self.index].backward + there)
        new[:, _PEAK] = np.maximum(sums[:, _PEAK], kept + max(forward, backward + later))
        new[:, _HOST] += held
        new[:, _HOST_PEAK] = np.maximum(sums[:, _HOST_PEAK], new[:, _HOST] + extra)
        new[:, _COMPUTE] += seconds_of(cost, rates) + operations * rates.launch
        new[:, _LINK] += (cost.copied + copied) / rates.link
        return new

    def _one_side(self, last: bool) -> tuple[float, float]:
        """What a boundary on the host adds to a segment on one side of it: operations, and bytes over the link."""
        on_host, on_device = self.costs[_MOVED][self.index], self.costs[SegmentMode("checkpoint")][self.index]
        sides = (self.index > 0) + (not last)
        operations = (on_host.operations - on_device.operations) / sides
        return operations, (on_host.copied - on_device.copied) / sides


def _best(groups: list[_Group], *, overlaps: bool) -> _Group:
    """The rows that no other row beats in every sum, thinned out."""
    sums = np.concatenate([group.sums for group in groups])
    modes = [one for group in groups for one in group.modes]
    compared = sums
    if not overlaps:
        compared = np.column_stack([sums[:, :_COMPUTE], sums[:, _COMPUTE] + sums[:, _LINK]])
    order = np.lexsort(tuple(compared.T))  # by time first
    rows = order[_undominated(compared[order])]
    on_host = sums[rows, _HOST_PEAK] > 0
    chosen = np.concatenate([_thinned(sums, rows[~on_host]), _thinned(sums, rows[on_host])])
    return _Group(sums[chosen], [modes[row] for row in chosen])


def _undominated(rows: Array) -> Places:
    """The sorted rows that no other one is at most as large as in every column; the first of equal ones."""
    columns = np.ascontiguousarray(rows.T)
    left, kept = np.arange(len(rows)), []
    while len(left):  # in blocks: most time goes into calls
        block, left = left[:_BLOCK], left[_BLOCK:]
        beaten = np.triu(_at_most(columns[:, block], columns[:, block]), 1).any(axis=0)
        best = block[~beaten]
        kept.append(best)
        left = left[~_at_most(columns[:, best], columns[:, left]).any(axis=0)]
    return np.concatenate(kept) if kept else np.empty(0, dtype=np.intp)


def _at_most(ones: Array, others: Array) -> npt.NDArray[np.bool_]:
    """[one, other]: whether the one is at most as large as the other in every row of these arrays."""
    smaller = ones[0][:, None] <= others[0]
    for one, other in zip(ones[1:], others[1:], strict=True):
        smaller &= one[:, None] <= other
    return smaller


def _thinned(sums: Array, rows: Places) -> Places:
    """The rows, at most `_KEPT` of them, spread evenly over what they keep on the device."""
    if len(rows) <= _KEPT:
        return rows
    ordered = rows[np.argsort(sums[rows, _KEPT_BYTES], kind="stable")]
    return ordered[np.linspace(0, len(rows) - 1, _KEPT).astype(np.intp)]
