"""Compressed gradients beside local updates: `compression` with the hooks of DDP alone, on 20, 100 and 1,000 Mbps."""

from collections.abc import Mapping, Sequence

from launch.benchmarks import compression
from launch.benchmarks.table import Result

HOOKS = "topk 1.0% ddp,dmgc 1.0% ddp,localsgd,diloco,sparseloco"


def measure(*, quick: bool, slides: Sequence[str], options: Mapping[str, str]) -> Result:
    """Measure the hooks of DDP, LocalSGD, DiLoCo and DiLoCo with chunked top-k.

    Args:
        quick, slides, options: those of `compression.measure`.

    Raises:
        ValueError: an unknown option.
    """
    defaults = {"hooks": HOOKS, **({} if quick else {"mbps": "20,100,1000", "seeds": "3"})}
    return compression.measure(quick=quick, slides=slides, options={**defaults, **options})
