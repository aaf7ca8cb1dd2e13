"""What each segment of a plan costs, out of simulated calls; carried over to other chunk sizes and numbers of tiles."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from ds_wsi.partition.planning.simulate import Phase

TILES = 4  # per chunk, in the small simulated calls


class SegmentMode(NamedTuple):
    """A segment's mode, and whether its input lies on the host between forward and backward."""

    mode: str
    host_input: bool = False


@dataclass(frozen=True)
class SegmentCost:
    """The cost of one segment in one mode; bytes and operations.

    Attributes:
        kept: bytes kept on the device from forward to backward, without its input (which `keeps_source` says it keeps).
        source, out: bytes of its input and its output.
        forward, backward: peak of each, beyond what earlier segments keep, what gradients later ones have summed, and
            input and output with their gradients.
        gradients: bytes of its parameters' gradients.
        host_extra: host memory at most, beyond what is kept there after forward.
        host, copied, flops, touched, operations: the same as in `Phase`.
    """

    kept: float
    source: float
    out: float
    forward: float
    backward: float
    gradients: float
    host: float
    host_extra: float
    copied: float
    flops: float
    touched: float
    operations: float
    keeps_source: bool = True


def profile(phases: list[Phase], mode: SegmentMode | None) -> list[SegmentCost]:
    """Each segment's costs out of a simulated call; forwards come in order, then backwards in reverse.

    Args:
        phases: the call's phases.
        mode: the mode of all its segments; None where they differ: what each keeps on the host is not told apart then.
    """
    count = len(phases) // 2
    forward, backward = phases[:count], list(reversed(phases[count:]))
    kept = [0, *(phase.live - phase.boundary for phase in forward)]  # by the segments before each
    summed = [*(phase.live - phase.boundary - before for phase, before in zip(backward, kept, strict=False)), 0]
    costs = []
    for index, (ahead, back) in enumerate(zip(forward, backward, strict=True)):
        source, out = (forward[index - 1].boundary if index else 0), ahead.boundary
        keeps = mode is not None and mode.mode in ("lean", "checkpoint", "recompute") and not mode.host_input
        on_host = mode is not None and mode.mode in ("offload", "stream")
        costs.append(
            SegmentCost(
                kept=kept[index + 1] - kept[index] - (source if keeps else 0),
                source=source,
                out=out,
                forward=ahead.peak - kept[index] - source - out,
                backward=back.peak - kept[index] - summed[index + 1] - 2 * source - out,
                gradients=summed[index] - summed[index + 1],
                host=ahead.host - (forward[index - 1].host if index else 0) if on_host else 0,
                host_extra=max(ahead.host_peak, back.host_peak) - ahead.host if on_host else 0,
                copied=ahead.copied + back.copied,
                flops=ahead.flops + back.flops,
                touched=ahead.touched + back.touched,
                operations=ahead.operations + back.operations,
                keeps_source=keeps,
            )
        )
    return costs


def fitted(few: SegmentCost, many: SegmentCost, wide: SegmentCost, size: int, tiles: int) -> SegmentCost:
    """The cost for `tiles` in chunks of `size`, through calls of 3 chunks of t, 4 of t and 3 of 2 t.

    Bytes are alpha + beta chunk + gamma tiles; work is alpha + beta chunks + gamma tiles.
    """
    values = {}
    for entry in fields(SegmentCost):
        if entry.name == "keeps_source":
            continue
        one, two, three = (getattr(cost, entry.name) for cost in (few, many, wide))
        if entry.name in ("copied", "flops", "touched", "operations"):
            by_tile = (three - one) / (3 * TILES)
            by_chunk = two - one - TILES * by_tile
            base = one - 3 * (by_chunk + TILES * by_tile)
            values[entry.name] = max(0.0, base + by_chunk * math.ceil(tiles / size) + by_tile * tiles)
        else:
            by_tile = (two - one) / TILES
            by_size = (three - one) / TILES - 3 * by_tile
            base = one - by_size * TILES - by_tile * 3 * TILES
            values[entry.name] = max(0.0, base + by_size * size + by_tile * tiles)
    return replace(few, **values)


def extrapolated(low: list[Phase], high: list[Phase], scale: float) -> list[Phase]:
    """The phases of a larger call, low + scale (high - low).

    A small call may peak where gradients of parameters are summed, a large one where activations are. What is alive
    when a phase begins grows evenly, so that the peak is at least that and what the phase added to it.
    """
    names = ("peak", "live", "host", "host_peak", "copied", "flops", "touched", "operations", "boundary")
    phases: list[Phase] = []
    before = 0
    for one, two in zip(low, high, strict=True):
        grown: dict[str, Any] = {}
        for name in names:
            first, second = getattr(one, name), getattr(two, name)
            grown[name] = int(max(0, first + scale * (second - first)))
        alive = phases[-1].live if phases else 0
        grown["peak"] = max(grown["peak"], alive + two.peak - before)
        before = two.live
        phases.append(replace(two, **grown))
    return phases
