"""Decoded tiles that are kept for the next read."""

import threading
from collections import OrderedDict

import numpy as np

CACHE_BYTES = 2**25
Key = tuple[int, int, int, int, str]  # slide, level, tile, scale, how it was shrunk


class TileCache:
    """Decoded tiles by the least recent use, bounded in bytes; what a process's slides may share.

    Pickles as an empty one. A forked process goes on with what it was forked with.

    Args:
        max_bytes: how many bytes of pixels are kept.
    """

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0, got {max_bytes}")
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self._tiles: OrderedDict[Key, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return type(self), (self.max_bytes,)

    def __len__(self) -> int:
        return len(self._tiles)

    def get(self, key: Key) -> np.ndarray | None:
        """A tile that is kept, or None."""
        with self._lock:
            if key not in self._tiles:
                return None
            self._tiles.move_to_end(key)
            return self._tiles[key]

    def put(self, key: Key, tile: np.ndarray) -> None:
        """Keep a tile, uint8 [h, w, 3], which is no longer written to; others go where it does not fit beside them."""
        if tile.nbytes > self.max_bytes:
            return
        with self._lock:
            before = self._tiles.pop(key, None)
            self.n_bytes += tile.nbytes - (before.nbytes if before is not None else 0)
            self._tiles[key] = tile
            while self.n_bytes > self.max_bytes:
                self.n_bytes -= self._tiles.popitem(last=False)[1].nbytes

    def drop(self, slide: int) -> None:
        """Let go of a slide's tiles."""
        with self._lock:
            for key in [key for key in self._tiles if key[0] == slide]:
                self.n_bytes -= self._tiles.pop(key).nbytes
