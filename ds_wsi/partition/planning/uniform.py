"""Plans without a search: every segment in one mode, and the sizes that calls are planned for."""

from collections.abc import Callable

from ds_wsi.partition.graph.record import Example
from ds_wsi.partition.graph.segments import Program
from ds_wsi.partition.graph.trace import Traced
from ds_wsi.partition.planning.plan import PartitionPlan, SegmentPlan
from ds_wsi.partition.policy import PartitionPolicy

DEFAULT_CHUNK = {"batch": 32, "spatial": 64}  # of a mode that is given, where the policy names no chunk


def uniform_plan(policy: PartitionPolicy, example: Example, traced: Callable[[], Traced]) -> PartitionPlan:
    """Every segment in the policy's mode, for inputs like the example; `traced` gives the module's graph for them."""
    size = policy.chunk_size or DEFAULT_CHUNK[policy.axis]
    host = policy.mode == "stream"
    whole = (SegmentPlan("", policy.mode, size, host),)
    segments: tuple[SegmentPlan, ...] = whole
    if policy.mode != "recompute":
        graph = traced()
        specs = tuple(segment.spec for segment in whole)
        cuts = [] if graph.opaque else Program(graph, specs, policy.axis, example.shape).candidates()
        segments = (*(SegmentPlan(node.name, policy.mode, size, host) for node in cuts), *whole)
    return PartitionPlan(segments, policy.axis, policy.bn_population, example.shape, compile=policy.compile)


def planning_size(tiles: int) -> int:
    """The number of tiles to plan for, at most half more: bags of all lengths share a few plans."""
    power = 1
    while power < tiles:
        power *= 2
    return power * 3 // 4 if power > 2 and tiles <= power * 3 // 4 else power
