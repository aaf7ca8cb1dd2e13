"""What may be read of an h5 file that another program wrote, and may be damaged.

HDF5 believes its files: text of variable length in a damaged one ends the process, and a damaged size makes it fill all
memory. So only what is needed is read, by name: numbers, and no more of them than a file of its size can hold.
"""

import os
from collections.abc import Iterable
from typing import Any

import h5py
import numpy as np

MAX_RATIO = 1100  # zlib, the strongest of HDF5's own filters, packs 1032 bytes in one


class H5Error(ValueError):
    """What is wrong with a file, without its name."""


def numbers(dataset: Any) -> np.ndarray:
    """The values of a dataset of numbers.

    Raises:
        H5Error: it is no such dataset, or larger than its file can be.
        OSError, RuntimeError, KeyError, ValueError, TypeError: HDF5's own.
    """
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "fiub":
        raise H5Error(f"{getattr(dataset, 'name', dataset)} must be a dataset of numbers")
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
