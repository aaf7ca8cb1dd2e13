"""Sizes as people write them."""

import re

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
MOST_BYTES = 2**60


def parse_bytes(text: str, name: str = "a size") -> int:
    """Bytes of "24GiB", "1.5 GB" or "800000".

    Raises:
        ValueError: no number, an unknown unit, or nothing at all.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{name} must be bytes such as 24GiB or 800MB, got {text!r}")
    size = float(match[1]) * _UNITS[match[2].lower()]
    if not 1 <= size <= MOST_BYTES:
        raise ValueError(f"{name} must be from 1 byte to {format_bytes(MOST_BYTES)}, got {_shortened(text)!r}")
    return int(size)


def _shortened(text: str) -> str:
    return text if len(text) < 50 else f"{text[:40]}..."


def format_bytes(size: int) -> str:
    """A size as `parse_bytes` reads it, in the largest unit of which there is one: "1.5 GiB", "12 bytes"."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"
