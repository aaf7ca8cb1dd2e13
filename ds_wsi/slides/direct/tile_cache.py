"""Decoded tiles that are kept for the next read."""

import threading
from collections import OrderedDict

import numpy as np

CACHE_BYTES = 2**25
Key = tuple[int, int, int, int, str]  # slide, level, tile, scale, how it was shrunk
Window = tuple[slice, slice]  # rows and columns of a tile


class TileCache:
    """Decoded tiles by the least recent use, bounded in bytes; what a process's slides may share.

    Memory of tiles that go is written to again: the system's first touch of new memory costs half of a decoding. Nobody
    holds a tile that is kept: what is wanted of it is copied.

    Pickles as an empty one. A forked process goes on with what it was forked with.

    Args:
        max_bytes: how many bytes of pixels are kept.

    Attributes:
        n_bytes: those of the tiles that are kept.
    """

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0, got {max_bytes}")
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self._tiles: OrderedDict[Key, np.ndarray] = OrderedDict()
        self._spare: list[np.ndarray] = []  # whose tiles went
        self._spare_bytes = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return type(self), (self.max_bytes,)

    def __len__(self) -> int:
        return len(self._tiles)

    def show(self, key: Key, window: Window, target: np.ndarray) -> bool:
        """Copy a part of a tile to `target` where the tile is kept; whether it is."""
        with self._lock:
            tile = self._tiles.get(key)
            if tile is None:
                return False
            self._tiles.move_to_end(key)
            target[:] = tile[window]
            return True

    def room(self, shape: tuple[int, int, int]) -> np.ndarray:
        """An array to decode a tile to, uint8 `shape`, the caller's until it is `put`."""
        with self._lock:
            self._make_room(shape[0] * shape[1] * shape[2])
            while self._spare:
                array = self._take_spare()
                if array.shape == shape:
                    return array
        return np.empty(shape, dtype=np.uint8)

    def put(self, key: Key, tile: np.ndarray) -> None:
        """Keep a tile, uint8 [h, w, 3], which is the cache's from now on; others go where it does not fit beside."""
        if tile.nbytes > self.max_bytes:
            return
        with self._lock:
            before = self._tiles.pop(key, None)
            self.n_bytes -= before.nbytes if before is not None else 0
            self._make_room(tile.nbytes)
            self.n_bytes += tile.nbytes
            self._tiles[key] = tile
            while self._spare and self.n_bytes + self._spare_bytes > self.max_bytes:
                self._take_spare()

    def drop(self, slide: int) -> None:
        """Let go of a slide's tiles."""
        with self._lock:
            for key in [key for key in self._tiles if key[0] == slide]:
                self._release(self._tiles.pop(key))

    def _make_room(self, n_bytes: int) -> None:
        """Let tiles go until so many bytes fit beside the others, or none is left."""
        while self._tiles and self.n_bytes + n_bytes > self.max_bytes:
            self._release(self._tiles.popitem(last=False)[1])

    def _release(self, tile: np.ndarray) -> None:
        self.n_bytes -= tile.nbytes
        self._spare_bytes += tile.nbytes
        self._spare.append(tile)

    def _take_spare(self) -> np.ndarray:
        array = self._spare.pop()
        self._spare_bytes -= array.nbytes
        return array
