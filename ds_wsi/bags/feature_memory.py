"""Features that stay in memory once they were read, so that an epoch reads a small cohort's files once in a run."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ds_wsi.runtime.memory import free_host_bytes
from ds_wsi.runtime.seams import check_seams

SMALL_BYTES = 2**18  # less than that is copied out of the mapping in which a reading process hands it over


class _Held(NamedTuple):
    """A file's features, and the number of times that they had been changed in place when they were taken in."""

    features: Tensor
    version: int


class FeatureMemory:
    """Features by file, up to so many bytes; what comes when they are full is not kept.

    Whoever is given features may not write to them: those that were changed in place are forgotten, and read again.
    Another process starts with nothing: what it is sent is the bound.

    Args:
        bound_bytes: bytes that are kept at the most; no more than a fourth of the memory that is free at the start,
            shared evenly among the machine's processes, is taken. 0 keeps nothing.
    """

    def __init__(self, bound_bytes: int) -> None:
        check_seams("torch", "features")
        self._asked = bound_bytes
        self._left = min(bound_bytes, free_host_bytes() // 2) if bound_bytes else 0
        self._held: dict[Path, _Held] = {}

    def __reduce__(self) -> tuple[type["FeatureMemory"], tuple[int]]:
        return FeatureMemory, (self._asked,)

    def get(self, path: Path) -> Tensor | None:
        """A file's features, float32 [N, D], or None where they are not held."""
        held = self._held.get(path)
        if held is None:
            return None
        if held.features._version != held.version:
            del self._held[path]
            self._left += held.features.nbytes
            return None
        return held.features

    def keep(self, path: Path, features: Tensor) -> None:
        """Hold a file's features, where there is room."""
        # What was made in inference mode cannot be trained on.
        if path in self._held or features.nbytes > self._left or features.is_inference():
            return
        # A part of a bag's features would hold the whole of them.
        if features.nbytes < SMALL_BYTES or features.nbytes < features.untyped_storage().nbytes():
            features = features.clone()
        self._left -= features.nbytes
        self._held[path] = _Held(features, features._version)
