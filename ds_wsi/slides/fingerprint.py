"""What a slide is known by, in every grid, store and file of features that is made of it."""

import hashlib
from pathlib import Path

from ds_wsi.runtime.fingerprint import Fingerprint, file_fingerprint


def slide_fingerprint(path: str | Path) -> Fingerprint:
    """The fingerprint of a slide's file; of MIRAX also of the files beside it that hold its pixels.

    Of formats that spread a slide over other files beside the one that is named (DICOM, VMS), that one alone counts.

    Raises:
        OSError: no such file, or not readable.
    """
    path = Path(path)
    own = file_fingerprint(path)
    folder = path.with_suffix("")
    if path.suffix.lower() != ".mrxs" or not folder.is_dir():
        return own
    digest = hashlib.sha256(own.sha256.encode())
    n_bytes = own.n_bytes
    for part in sorted(entry for entry in folder.iterdir() if entry.is_file()):
        found = file_fingerprint(part)
        digest.update(f"{part.name} {found.sha256}\n".encode())
        n_bytes += found.n_bytes
    return Fingerprint(n_bytes, digest.hexdigest())
