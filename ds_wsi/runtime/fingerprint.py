"""What a file is known by: its content, sampled, and never its name or its time."""

import hashlib
import os
from functools import lru_cache
from typing import NamedTuple

from ds_wsi.runtime.files import open_file

WHOLE_BYTES = 2**25  # files of up to 32 MiB are hashed whole
PIECE_BYTES = 2**16
N_PIECES = 32


class Fingerprint(NamedTuple):
    """What a file is known by.

    Attributes:
        n_bytes: the file's size.
        sha256: the hash of its content, or of pieces of it (`file_fingerprint`); hexadecimal.
    """

    n_bytes: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.n_bytes} bytes, sha256 {self.sha256[:16]}"


def file_fingerprint(path: str | os.PathLike[str]) -> Fingerprint:
    """The file's size and a SHA-256: of all of it up to 32 MiB, else of 32 pieces of 64 KiB, evenly spaced.

    The first and the last piece are the file's head and end, where a TIFF has its directories: places and lengths of
    all its compressed tiles, so that another picture is another hash. The pieces in between tell pictures apart that
    are not compressed, whose directories can be the same. Whole slides are gigabytes, and 2 MiB of each are read in
    milliseconds. A file that was copied or touched has the same fingerprint: time and name take no part.

    Raises:
        OSError: no such file, or not readable.
    """
    path = os.path.realpath(path)
    status = os.stat(path)
    return _fingerprint(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=2**16)
def _fingerprint(path: str, device: int, inode: int, n_bytes: int, *times: int) -> Fingerprint:
    """Read once per process while the file stays as it is."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        if n_bytes <= WHOLE_BYTES:
            digest.update(file.read())
        else:
            last = n_bytes - PIECE_BYTES
            for number in range(N_PIECES):
                file.seek(last * number // (N_PIECES - 1))
                digest.update(file.read(PIECE_BYTES))
    return Fingerprint(n_bytes, digest.hexdigest())
