"""Running statistics that each process tracks of the slides it sees: a checkpoint keeps each process's own.

The weights in a checkpoint hold the statistics of all processes together, as an export does, so that any number of
processes goes on from them. A process that goes on in its own place gets its own back: a save changes nothing.
"""

import torch
from torch import Tensor, nn

from ds_wsi.engines.accelerator.engine import Accelerator, average_buffers, tracked_buffers
from ds_wsi.runtime.tensor_file import TensorFile


@torch.no_grad()
def pool(accelerator: Accelerator, module: nn.Module) -> dict[str, Tensor]:
    """Pool the statistics of all processes, in place; returns this process's own, by name, for `put_back`.

    Collective.
    """
    statistics = {name: buffer.detach().clone() for name, buffer, _ in tracked_buffers(accelerator, module)}
    average_buffers(accelerator, module)
    return statistics


@torch.no_grad()
def put_back(accelerator: Accelerator, module: nn.Module, statistics: dict[str, Tensor]) -> None:
    """Put this process's own statistics back."""
    for name, buffer, _ in tracked_buffers(accelerator, module):
        buffer.copy_(statistics[name])


@torch.no_grad()
def load(accelerator: Accelerator, module: nn.Module, file: TensorFile) -> None:
    """Go on from a file of what `pool` returned.

    Raises:
        ValueError: the file lacks one of them, or has it in another shape.
    """
    for name, buffer, _ in tracked_buffers(accelerator, module):
        buffer.copy_(file.read_like(name, buffer))
