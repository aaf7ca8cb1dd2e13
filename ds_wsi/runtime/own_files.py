"""Files of fixed names in a user's folder: written over only where this program wrote them."""

import os
from collections.abc import Callable
from pathlib import Path

HEAD_BYTES = 2**12


def begins_with(path: Path, *heads: str) -> bool:
    """Whether a file, no link, begins with one of these texts, as the files that the program writes do."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        content = file.read(HEAD_BYTES)
    return any(content.startswith(head.encode()) for head in heads)


def require_ours(path: Path, is_ours: Callable[[Path], bool], what: str) -> None:
    """Refuse to write over a file of another program, or of the user's.

    Args:
        path: the file to be written; nothing may be there.
        is_ours: whether what is there was written by this program.
        what: the option, or the words, that name the place.

    Raises:
        ValueError: something else is there; names it.
    """
    if os.path.lexists(path) and not is_ours(path):
        raise ValueError(
            f"{what} must not hold files of other programs under the names that are written there, got {path}. HINT: "
            "give a new folder or name, or move it away."
        )
