"""Random state as a function of (seed, step, rank): nothing to save, a resumed run draws what it would have drawn."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor


def step_seed(seed: int, step: int, place: int) -> int:
    """A seed of one step and place in it."""
    return ((seed * 1_000_003 + step) * 10_007 + place) % 2**63


def slide_seed(seed: int, epoch: int, slide: int) -> int:
    """A seed of one slide in one epoch."""
    return ((seed * 1_000_003 + epoch) * 1_000_003 + slide) % 2**63


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed Python's, NumPy's and torch's generators (CPU and current device) for one step of one rank."""
    value = step_seed(seed, step, rank)
    random.seed(value)
    np.random.seed(value % 2**32)
    _seed_torch(value)


def _seed_torch(seed: int) -> None:
    """Seed the CPU's generator and the GPUs' as `torch.manual_seed` does, which does more where there is no GPU.

    There it notes the call, and where it came from, for each kind of device that might come to be used: half a
    millisecond a step, and a list that grows with every one.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized() or _has_gpu():
        torch.cuda.manual_seed_all(seed)


@cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()


def generator_states(device: torch.device) -> list[Tensor]:
    """The states of torch's generators that an operation on `device` can draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_generator_states(states: list[Tensor], device: torch.device) -> None:
    """Set what `generator_states` returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def keyed_generators(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw from generators seeded with `seed` inside, and go on outside as if nothing had been drawn; None: as is."""
    if seed is None:
        yield
        return
    before = generator_states(device)
    _seed_torch(seed)
    try:
        yield
    finally:
        set_generator_states(before, device)
