"""Files that `torch.save` wrote, read without running what is in them, and without taking more memory than they have.

A file of torch's is an archive that compresses nothing. One that does can hold a thousand times its size; so can a
tensor whose rows all lie in the same place. Its records have a CRC-32 each, which torch itself does not look at.
"""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class TorchFileError(ValueError):
    """What is wrong with a file, without its name."""


def load_tensors(path: Path, *, mmap: bool = False) -> Any:
    """The tensors, numbers and texts of a file, on the CPU.

    Args:
        path: the file.
        mmap: leave the tensors on the disk, where the file is an archive.

    Raises:
        TorchFileError: an archive that is compressed, or of which a record has another checksum than was written; those
            that stay on the disk are not looked at.
        Exception: any of torch's, where it is damaged or holds anything else.
    """
    is_archive = zipfile.is_zipfile(path)
    if is_archive:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
            n_bytes = sum(record.file_size for record in records)
            if packed or n_bytes > path.stat().st_size:  # records can lie on top of each other
                raise TorchFileError(
                    f"a file of torch.save must not be compressed, got {packed[0] if packed else n_bytes} "
                    f"{'which is' if packed else 'bytes in a smaller file'}"
                )
            broken = None if mmap else archive.testzip()
        if broken is not None:
            raise TorchFileError(
                f"a file of torch.save must have the checksums that were written, got another of {broken}. HINT: a "
                "file that was saved under torch.serialization.set_crc32_options(False) has none, save it without"
            )
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_archive)


def require_in_memory(tensor: Tensor, name: str) -> None:
    """Refuse a tensor that is larger than what is stored of it, which a copy of it would take.

    Raises:
        TorchFileError: it is.
    """
    if tensor.layout == torch.strided and tensor.nbytes > tensor.untyped_storage().nbytes():
        raise TorchFileError(
            f"{name} must be stored whole, got {list(tensor.shape)} of which {tensor.untyped_storage().nbytes()} bytes "
            "are there. HINT: save it with .contiguous()"
        )
