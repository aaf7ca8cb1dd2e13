"""What a host store hands out for a tensor: a claim on its copy, or the copy on its way to the device."""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_wsi.partition.execution.free_list import Block


@dataclass(eq=False)
class Ticket:
    """A tensor that lies in host memory, or (`memory` None) on the disk only."""

    memory: Tensor | None
    dtype: torch.dtype
    size: int
    shape: torch.Size
    stride: tuple[int, ...]
    block: Block | None
    ready: Any = None
    fetched: Tensor | None = None
    arrived: Any = None
    stream: Any = None  # that computes with it
    released: bool = False
    number: int = 0  # in the order of sending
    owners: int = 1
    key: Any = None
    written: Future | None = None  # of its place on the disk
    reading: Future | None = None


@dataclass(eq=False)
class Arriving:
    """A tensor on its way to the device.

    Args:
        tensor: memory of the computing stream that it was asked for on.
        arrived: recorded after the copy.
        stream: the same computing stream.
    """

    tensor: Tensor
    arrived: Any
    stream: Any

    def get(self) -> Tensor:
        """The tensor, for the computing stream of now."""
        torch.cuda.current_stream(self.tensor.device).wait_event(self.arrived)
        return self.tensor

    def drop(self) -> None:
        """Give it up: its memory goes to nobody before the copy has ended, whatever thread says so."""
        self.stream.wait_event(self.arrived)
