"""What a computation that is repeated in backward, or in pieces, must share with the first: precision and layout."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ds_wsi.runtime.choices import PRECISIONS

# Of mixed precision, as Accelerate names them -> what autocast casts to.
DTYPES: Mapping[str, torch.dtype | None] = dict(zip(PRECISIONS, (None, torch.bfloat16, torch.float16), strict=True))


def autocast_to(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to a key of `PRECISIONS`; "no" leaves what is in force."""
    dtype = DTYPES[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast in force, or None."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def autocast_now(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """The autocast settings in force, to be entered again in backward.

    Without the cache of cast weights: an entry made in one chunk's graph would be part of the next one's.
    """
    kind, dtype = device.type, autocast_dtype(device)
    if dtype is None:
        return lambda: torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
    return lambda: torch.autocast(kind, dtype=dtype, cache_enabled=False)


def widened(values: Tensor) -> Tensor:
    """Half precision as float32, wider types as they are: the type to accumulate in."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def memory_layout(x: Tensor) -> torch.memory_format:
    """Channels last where `x` is stored so, else contiguous."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
