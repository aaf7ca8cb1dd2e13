"""Runs a function in several gloo processes here; torch and DeepSpeed are imported once, in the forkserver."""

import multiprocessing
from collections.abc import Callable
from typing import Any

from launch.benchmarks import ranks

TIMEOUT_S = 600  # one launch holds many cases, beside other tests
_context = multiprocessing.get_context("forkserver")
# frozen: DeepSpeed collects garbage several times per engine, and would look through all that was imported.
_context.set_forkserver_preload(["torch", "deepspeed", "accelerate", "timm", "frozen"])


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """See `launch.benchmarks.ranks.run_ranks`."""
    return ranks.run_ranks(function, world_size, *arguments, timeout_s=TIMEOUT_S, context=_context)
