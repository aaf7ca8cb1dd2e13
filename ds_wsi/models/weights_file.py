"""A model's weights on disk: safetensors with checksums, and nothing in them that is no number."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ds_wsi.runtime.files import atomic_path, require_file
from ds_wsi.runtime.tensor_file import write_tensors
from ds_wsi.runtime.tensor_seal import opened, sealed
from ds_wsi.runtime.words import some

_SHOWN = 3


class WeightsFileError(ValueError):
    """What is wrong with a file of weights, without its name."""


def save_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write whole weights as safetensors with checksums, atomically."""
    tensors = {name: value.detach().cpu() for name, value in state.items()}
    with atomic_path(path, sum(value.nbytes for value in tensors.values())) as temporary:
        write_tensors(temporary, tensors, sealed({"format": "pt"}, _bytes_of(tensors)))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `save_weights` wrote, on the CPU; those of earlier versions have no checksums.

    Raises:
        WeightsFileError: another kind of file, or other values than were written.
        OSError: it is missing, or not readable.
    """
    try:
        require_file(path)
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            opened(file.metadata() or {}, _bytes_of(tensors))
    except (SafetensorError, ValueError) as error:
        raise WeightsFileError(str(error).splitlines()[0]) from error
    return tensors


def require_finite(module: nn.Module) -> None:
    """Refuse parameters with infinity or NaN, and buffers with NaN, which some fill with infinity on purpose.

    Raises:
        WeightsFileError: names some.
    """
    wrong = [name for name, value in module.named_parameters() if not bool(value.isfinite().all())]
    wrong += [name for name, value in module.named_buffers() if value.is_floating_point() and bool(value.isnan().any())]
    if wrong:
        raise WeightsFileError(f"{len(wrong)} tensors with infinity or no number ({some(wrong, _SHOWN)})")


def _bytes_of(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Their bytes: numpy has not all of torch's dtypes."""
    flat = {name: value.contiguous().reshape(-1) for name, value in tensors.items()}
    return {name: value.view(torch.uint8).numpy() for name, value in flat.items()}
