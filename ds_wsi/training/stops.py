"""A run that is asked to end, by a signal or by the clock: all ranks agree, and what was done is kept."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ds_wsi.runtime.signals import Stopped, asked
from ds_wsi.training.context import RunContext
from ds_wsi.training.resume import save
from ds_wsi.training.run import Run


@contextmanager
def kept_when_stopped(run: Run) -> Iterator[None]:
    """Write a checkpoint where the run is stopped in the block, as all ranks are."""
    try:
        yield
    except Stopped:
        save(run)
        raise


def wants_to_stop(run: Run) -> bool:
    """Whether this rank was asked to end, or the run's time is over."""
    return bool(asked()) or _time_is_over(run)


def words_of_stop(run: Run) -> str:
    """What has stopped the run, where a rank wanted to stop."""
    limit = run.settings.run.max_minutes
    return asked() or (f"--max_minutes {limit:g}" if _time_is_over(run) else "a signal to another rank")


def any_rank_asked(run: RunContext) -> bool:
    """Whether any rank was asked to end. Collective: an all-reduce, the identity on one rank."""
    told = torch.tensor(float(bool(asked())), device=run.device)
    return bool(run.accelerator.reduce(told, "sum") > 0)


def _time_is_over(run: Run) -> bool:
    return 0 < 60 * run.settings.run.max_minutes <= time.perf_counter() - run.clock.started
