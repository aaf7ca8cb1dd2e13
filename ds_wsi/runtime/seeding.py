"""Random state as a function of (seed, step, rank): nothing to save, a resumed run draws what it would have drawn."""

import random

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed Python's, NumPy's and torch's generators (CPU and current device) for one step of one rank."""
    value = ((seed * 1_000_003 + step) * 10_007 + rank) % 2**63
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
