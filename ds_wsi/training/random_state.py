"""The generators of a process in a checkpoint: Python's, NumPy's and torch's, as tensors of a file.

A step seeds them all, so that what is drawn does not depend on them. A process that goes on in its own place gets them
back none the less: between two steps somebody may draw.
"""

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ds_wsi.runtime.seeding import generator_states, set_generator_states
from ds_wsi.runtime.tensor_file import TensorFile


def take_random(device: torch.device) -> dict[str, Tensor]:
    """The states of all generators of this process, on the CPU."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, second = np.random.get_state(legacy=True)
    states = generator_states(device)
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor(np.asarray(keys).astype(np.int64)),
        "numpy_place": torch.tensor([int(position), int(has_gauss)], dtype=torch.int64),
        "numpy_gauss": torch.tensor([float(second)], dtype=torch.float64),
        "torch": states[0].clone(),
    }
    return tensors | ({"device": states[1].cpu()} if len(states) > 1 else {})


def put_random(file: TensorFile, device: torch.device) -> None:
    """Go on from `take_random`.

    Raises:
        ValueError: the file holds no such states.
    """
    try:
        gauss = file.read("python_gauss").tolist()
        random.setstate((3, tuple(file.read("python").tolist()), gauss[0] if gauss else None))
        position, has_gauss = file.read("numpy_place").tolist()
        keys = file.read("numpy").numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, position, has_gauss, file.read("numpy_gauss").item()))
        states = [file.read("torch"), *([file.read("device")] if "device" in file.names else [])]
        set_generator_states(states if device.type == "cuda" else states[:1], device)
    except Exception as error:  # what a generator refuses it refuses in many ways
        raise ValueError(
            f"{Path(file.path).name} must hold the states of a process's generators, got others ({error}). "
            "HINT: another checkpoint."
        ) from error
