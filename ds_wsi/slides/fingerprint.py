"""What a slide is known by, in every grid, store and file of features that is made of it."""

import hashlib
from pathlib import Path

from ds_wsi.runtime.fingerprint import Fingerprint, file_fingerprint


def slide_fingerprint(path: str | Path) -> Fingerprint:
    """The fingerprint of a slide's file, or of all files of its folder; of MIRAX also of those that hold its pixels.

    Of other formats that spread a slide over files beside the one that is named (VMS), that one alone counts.

    Raises:
        OSError: no such file or folder, or not readable.
    """
    path = Path(path)
    if path.is_dir():
        return _of_files(path, Fingerprint(0, ""))
    of_file = file_fingerprint(path)
    folder = path.with_suffix("")
    if path.suffix.lower() != ".mrxs" or not folder.is_dir():
        return of_file
    return _of_files(folder, of_file)


def _of_files(folder: Path, first: Fingerprint) -> Fingerprint:
    digest = hashlib.sha256(first.sha256.encode())
    n_bytes = first.n_bytes
    for part in sorted(entry for entry in folder.iterdir() if entry.is_file()):
        of_part = file_fingerprint(part)
        digest.update(f"{part.name} {of_part.sha256}\n".encode())
        n_bytes += of_part.n_bytes
    return Fingerprint(n_bytes, digest.hexdigest())
