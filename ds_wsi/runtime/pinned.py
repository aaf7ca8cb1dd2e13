"""Page-locked host memory, exactly as much as is asked for."""

import ctypes
import weakref
from contextlib import suppress

import torch
from torch import Tensor

from ds_wsi.runtime.log import logger


class PageLocked:
    """Bytes that a GPU copies from and to while the CPU goes on.

    torch's own page-locked allocator rounds each request up to a power of two and keeps what is freed: a plan of
    65 GiB would lock 128 GiB for good. Here ordinary memory is registered with the driver and given back when the
    object goes.

    Args:
        size: number of bytes.
        device: the GPU.

    Attributes:
        data: uint8 [size].

    Raises:
        RuntimeError: the driver refuses to lock that much.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.data = torch.empty(size, dtype=torch.uint8)
        refused = int(torch.cuda.cudart().cudaHostRegister(self.data.data_ptr(), size, 0))
        if refused:
            _forget_error()
            raise RuntimeError(f"cudaHostRegister of {size:,} bytes returned error {refused}")
        # The finalizer holds the memory, so that it is unlocked before it is freed.
        self._unlock = weakref.finalize(self, _unlock, self.data, device)
        self._unlock.atexit = False  # the driver ends with the process, and the lock with it

    def close(self) -> None:
        """Give the memory back, once no copy uses it."""
        self._unlock()


def locked_or_none(size: int, device: torch.device) -> PageLocked | None:
    """Page-locked bytes, or None, with a warning, where the driver refuses: a container's limit, a virtual machine.

    Pageable memory is as right in its place; copies from and to it wait, and run beside nothing.
    """
    try:
        return PageLocked(size, device)
    except RuntimeError as error:
        logger.warning(
            "host memory is pageable from here on, and copies do not overlap: locking %.1f GiB failed (%s)",
            size / 2**30,
            str(error).splitlines()[0],
        )
        return None


def _forget_error() -> None:
    """Take the error off this thread, or torch would find it after its next kernel and blame that."""
    with suppress(AttributeError, OSError):  # torch has no binding, and loads the runtime for all to see
        ctypes.CDLL(None).cudaGetLastError()


def _unlock(data: Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(data.data_ptr())
