"""Contexts that a forward enters itself: no_grad and autocast, in which a recorded operation runs again."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import fx

is_inference = torch.is_inference_mode_enabled  # what a forward asks may be told another answer: see `record`


class Surroundings(NamedTuple):
    """What an operation was called in.

    Args:
        graded: whether autograd followed it.
        kind: the device's type, which names autocast's settings.
        dtype: autocast's dtype on it; None where that is off.
    """

    graded: bool
    kind: str
    dtype: torch.dtype | None


def surroundings_now(kind: str, *, graded: bool) -> Surroundings:
    """The surroundings in force; `graded` is whether the forward has not cut itself off by no_grad."""
    graded = graded and not is_inference()
    return Surroundings(graded, kind, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)


def is_detached(node: fx.Node) -> bool:
    """Whether the forward itself cuts the operation from autograd."""
    surroundings = node.meta.get("surroundings")
    return surroundings is not None and not surroundings.graded


def surroundings_of(node: fx.Node) -> AbstractContextManager[None]:
    """A context of what the forward entered around the operation; an empty one where it entered none."""
    surroundings = node.meta.get("surroundings")
    return nullcontext() if surroundings is None else _entered(surroundings)


@contextmanager
def _entered(surroundings: Surroundings) -> Iterator[None]:
    graded = torch.is_grad_enabled() and surroundings.graded
    with (
        torch.set_grad_enabled(graded),
        # Without the cache of cast weights: see `autocast_now`.
        torch.autocast(
            surroundings.kind, dtype=surroundings.dtype, enabled=surroundings.dtype is not None, cache_enabled=False
        ),
    ):
        yield
