"""The statistics that each BatchNorm of an encoder takes, set in place through its own flags and undone by them."""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn

from ds_wsi.runtime.seams import AnyBatchNorm

GROUP = "population_group"  # of a bag: the ranks that hold its tiles
STEP_GROUP = "population_group_of_step"
_EVALUATED = "population_group_is_of_bag"
STATISTICS = ("running", "own", "tracked")
_TRACKS = "_tracks_by_itself"  # what `track_running_stats` was before it was changed


def batch_norms(module: nn.Module) -> list[Any]:
    """Every BatchNorm of `module`, each once, in the order of registration."""
    return [part for part in module.modules() if isinstance(part, AnyBatchNorm)]


def named_batch_norms(module: nn.Module) -> dict[str, Any]:
    """Every BatchNorm of `module` by its name there, each once, as `batch_norms` has them."""
    return {name: part for name, part in module.named_modules() if isinstance(part, AnyBatchNorm)}


def population_group(norm: nn.Module, *, in_training: bool = False) -> Any:
    """The group whose ranks share a norm's population: SyncBatchNorm's own, the one that was given to it, or None.

    The ranks of a step share nothing in evaluation, where each has slides of its own, more and fewer; those that hold
    the tiles of one bag do.

    Args:
        norm: any module.
        in_training: the group of training, in whichever mode the norm is now.
    """
    if not dist.is_initialized():
        return None
    if isinstance(norm, nn.SyncBatchNorm):
        return norm.process_group or dist.group.WORLD
    held = norm.__dict__
    if STEP_GROUP in held and (in_training or not held.get(_EVALUATED, False)):
        return held[STEP_GROUP]
    return held.get(GROUP)


def set_evaluated(norms: Iterable[nn.Module], evaluated: bool) -> None:
    """Say whether norms are evaluated from now on, slide by slide, or trained: see `population_group`."""
    for norm in norms:
        norm.__dict__[_EVALUATED] = evaluated


def starts_fresh(module: nn.Module) -> bool:
    """Whether the running statistics are still those of new norms: nothing was loaded, nothing was trained.

    So it is of norms without any, whose weights may have been loaded; and not of a module without a norm.
    """
    norms = batch_norms(module)
    tracked = [norm for norm in norms if norm.running_mean is not None]
    return bool(norms) and all(
        bool((norm.running_mean == 0).all() and (norm.running_var == 1).all()) for norm in tracked
    )


def normalise_with(norm: Any, statistics: str) -> None:
    """Let one norm normalise with other statistics from now on, in place; other parts of it keep their mode.

    Args:
        norm: a BatchNorm.
        statistics: "running": its running ones. "own": those of what it is given, which leave the running ones as they
            are. "tracked": the same, which the running ones follow, as in training.
    """
    assert statistics in STATISTICS, statistics
    tracks = norm.__dict__.pop(_TRACKS, norm.track_running_stats)
    norm.training = statistics != "running"
    norm.track_running_stats = tracks
    if statistics == "own" and tracks:
        norm.__dict__[_TRACKS] = tracks
        norm.track_running_stats = False


def is_shared(module: nn.Module) -> bool:
    """Whether any BatchNorm of `module` has its population on several ranks."""
    return any(population_group(part) is not None for part in batch_norms(module))
