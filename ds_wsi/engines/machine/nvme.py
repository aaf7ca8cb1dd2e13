"""A disk under the host store, read and written by DeepSpeed's asynchronous I/O, past the page cache."""

import os
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_wsi.engines.machine.cpu import without_gpu
from ds_wsi.engines.machine.ops import COMPILER, compiler_lacks, is_installed
from ds_wsi.partition import PartitionPlan, PartitionPolicy
from ds_wsi.partition.execution.free_list import Block, FreeList
from ds_wsi.partition.execution.host_store import ALIGN
from ds_wsi.runtime.memory import free_disk_bytes

_BLOCK = 2**20  # bytes of one request
_QUEUE = 32  # requests in flight
_THREADS = 2
_GROWTH = 2**28  # bytes that the file grows by


class NvmeSpill:
    """The `spill` of `partition_layers`: one file without a name, gone with the process however that ends.

    Args:
        directory: a folder on a local disk; a network file system is slower than computing again.
        budget_bytes: what the file grows to at most; None: this rank's share of half of what is free.

    Attributes:
        written_bytes, read_bytes: what was written and read so far.

    Raises:
        ValueError: the folder is missing or refuses such a file.
        RuntimeError: DeepSpeed's aio does not build here; says why.
    """

    def __init__(self, directory: str | Path, budget_bytes: int | None = None) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ValueError(f"nvme_path must be a folder, got {self.directory} (missing)")
        self._handle = _aio_handle()
        try:
            descriptor = os.open(self.directory, os.O_RDWR | os.O_TMPFILE | os.O_DIRECT, 0o600)
        except OSError as error:
            raise ValueError(
                f"nvme_path must be on a file system with O_TMPFILE and O_DIRECT (ext4, xfs), got {self.directory} "
                f"({error.strerror}). HINT: give a folder on a local disk, not on tmpfs, overlayfs or a network."
            ) from error
        # DeepSpeed opens its file by name; this is the name of a file that has none.
        self._file = f"/proc/self/fd/{descriptor}"
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self.budget_bytes = budget_bytes or free_disk_bytes(self.directory)
        self._free, self._size = FreeList(), 0
        self.written_bytes = self.read_bytes = 0

    @classmethod
    def of(cls, wanted: PartitionPolicy | PartitionPlan) -> "NvmeSpill | None":
        """The disk of a policy or plan; None where it names none."""
        return cls(wanted.nvme_path, wanted.nvme_budget_bytes) if wanted.nvme_path else None

    def write(self, data: Tensor) -> Block:
        """What `ds_wsi.partition.execution.host_store.Spill` asks of a disk.

        Raises:
            OSError: the budget or the disk is full, or the disk fails.
        """
        block = self._free.take(data.numel())
        if block is None:
            self._grow(data.numel())
            block = self._free.take(data.numel())
        assert block is not None
        self._check(self._handle.sync_pwrite(data, self._file, block[1]), "write", data.numel())
        self.written_bytes += data.numel()
        return block

    def read(self, place: Block, data: Tensor) -> None:
        """What `ds_wsi.partition.execution.host_store.Spill` asks of a disk."""
        self._check(self._handle.sync_pread(data, self._file, place[1]), "read", data.numel())
        self.read_bytes += data.numel()

    def free(self, place: Block) -> None:
        """What `ds_wsi.partition.execution.host_store.Spill` asks of a disk."""
        self._free.give_back(place)

    def _grow(self, size: int) -> None:
        room = (self.budget_bytes - self._size) // ALIGN * ALIGN
        if size > room:
            raise OSError(
                f"the activations on {self.directory} must fit {self.budget_bytes:,} bytes, got {size:,} more at "
                f"{self._size:,}. HINT: raise nvme_budget, host_budget, or let the plan recompute more."
            )
        grown = min(max(size, _GROWTH), room)
        try:
            os.posix_fallocate(self._descriptor, self._size, grown)
        except OSError as error:
            raise OSError(
                f"{self.directory} has no room for {grown:,} bytes of activations more ({error.strerror}). "
                "HINT: free some, or give a smaller nvme_budget."
            ) from error
        # One slab: a file is contiguous however often it grew.
        self._free.give_back((0, self._size, grown))
        self._size += grown

    def _check(self, done: int, verb: str, size: int) -> None:
        if done != 1:
            raise OSError(f"the disk of {self.directory} failed to {verb} {size:,} bytes (aio says {done})")


def _aio_handle() -> Any:
    """DeepSpeed's, compiled at first use (a minute or two).

    Raises:
        RuntimeError: it does not build; says what is missing and what to install.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    try:
        builder = AsyncIOBuilder()
        lacks = None if is_installed(builder.NAME) else _aio_lacks(builder)
        if lacks is None:
            return builder.load().aio_handle(_BLOCK, _QUEUE, False, True, _THREADS)
    except Exception as error:
        raise RuntimeError(f"nvme_path needs DeepSpeed's aio, which did not build: {error}. {_aio_remedy()}") from error
    raise RuntimeError(f"nvme_path needs DeepSpeed's aio, which cannot be built here: {lacks}. {_aio_remedy()}")


def _aio_lacks(builder: Any) -> str | None:
    """What is missing to build it, as far as can be told beforehand; None: nothing."""
    from torch.utils.cpp_extension import CUDA_HOME

    lacks = [lack] if (lack := compiler_lacks()) else []
    if not lacks and not builder.is_compatible(verbose=False):
        lacks.append("libaio is missing")
    if not without_gpu() and CUDA_HOME is None and torch.version.hip is None:
        lacks.append("on a GPU it links -lcuda and -lcudart of a CUDA toolkit, and there is none (CUDA_HOME)")
    return "; ".join(lacks) or None


def _aio_remedy() -> str:
    toolkit = "" if without_gpu() else f", and the CUDA toolkit {torch.version.cuda} with CUDA_HOME set to its folder"
    return f"HINT: install libaio's headers (libaio-dev), {COMPILER}{toolkit}; or leave nvme_path out."
