"""What may be read of an h5 file that another program wrote, and may be damaged.

HDF5 believes its files: text of variable length in a damaged one ends the process, and a damaged size makes it fill all
memory. It also follows the file to others: by links, virtual datasets and raw files that a dataset names. So only what
is needed is read, by name: numbers that are in this file, and no more of them than a file of its size can hold.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np

from ds_wsi.runtime.files import require_file

MAX_RATIO = 1100  # zlib, the strongest of HDF5's own filters, packs 1032 bytes in one


class H5Error(ValueError):
    """What is wrong with a file, without its name."""


@contextmanager
def opened_h5(path: str | os.PathLike[str]) -> Iterator[h5py.File]:
    """Open an h5 file to read; a pipe or a device is an error.

    Raises:
        ValueError: it is no file.
        OSError: it is no h5 file, or not readable.
    """
    require_file(path)
    with h5py.File(path, "r") as file:
        yield file


def member(file: h5py.File, name: str) -> Any:
    """What lies under a name in the file itself; None where there is nothing.

    Raises:
        H5Error: a link is there, which may lead into another file.
        OSError, RuntimeError, KeyError, ValueError, TypeError: HDF5's own.
    """
    link = file.get(name, getlink=True)
    if link is None:
        return None
    if not isinstance(link, h5py.HardLink):
        raise H5Error(f"{name} must be in this file, got a link ({type(link).__name__})")
    return file[name]


def numbers(dataset: Any) -> np.ndarray:
    """The values of a dataset of numbers.

    Raises:
        H5Error: it is no such dataset, or larger than its file can be.
        OSError, RuntimeError, KeyError, ValueError, TypeError: HDF5's own.
    """
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "fiub":
        raise H5Error(f"{getattr(dataset, 'name', dataset)} must be a dataset of numbers")
    if dataset.is_virtual or dataset.external:
        raise H5Error(f"{dataset.name} must have its numbers in this file, got a dataset whose numbers are in another")
    room = MAX_RATIO * os.path.getsize(dataset.file.filename)
    if dataset.nbytes > room:
        raise H5Error(f"{dataset.name} must be in its file, got {list(dataset.shape)}, which the file has no room for")
    return np.asarray(dataset)


def number_attributes(holder: Any, names: Iterable[str]) -> dict[str, Any]:
    """Those attributes of a file or dataset that are there, and are numbers.

    Raises:
        OSError, RuntimeError, KeyError, ValueError, TypeError: HDF5's own.
    """
    attributes = {}
    for name in names:
        if name not in holder.attrs:
            continue
        kind = holder.attrs.get_id(name)
        if kind.dtype.kind in "fiub" and kind.get_storage_size() < 2**16:
            attributes[name] = holder.attrs[name]
    return attributes
