"""Standard streams as they are: closed by the caller, read by nobody any more, or of another encoding.

Results are printed by `show` alone, after the files that hold them are written: who reads them may have left
(`ds-wsi tile ... | head`), and nothing that was computed is lost by that.
"""

import os
import sys
from contextlib import suppress
from typing import TextIO

_STREAMS = (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w"))


def open_closed_streams() -> None:
    """Open the null device in the place of streams that the caller closed (`2>&-`), of which Python makes None.

    Else the next file that is opened gets the stream's number, and with it what a library prints there.
    """
    for name, number, mode in _STREAMS:
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115


def show(text: object = "") -> None:
    """Print a result on standard output, at once. Nothing where its reader is gone, as a shell's tools are silent then.

    What the stream's encoding has not, such as a byte of a folder's name that is no UTF-8, is escaped.

    Raises:
        OSError: it is a file that cannot be written to.
    """
    words, out = str(text), sys.stdout
    try:
        try:
            print(words, file=out, flush=True)
        except UnicodeEncodeError:
            escaped = words.encode(out.encoding, "backslashreplace").decode(out.encoding)
            print(escaped, file=out, flush=True)
    except OSError as error:
        _point_at_nothing(out)
        if not isinstance(error, BrokenPipeError):
            raise


def settle_streams() -> None:
    """Flush what is left for readers that are gone; else Python, as it ends, would make the exit status 120.

    Raises:
        OSError: standard output is a file that cannot be written to: what was printed is not whole.
    """
    for out in (sys.stderr, sys.stdout):
        try:
            out.flush()
        except (BrokenPipeError, ValueError):  # the reader is gone, or the stream was closed
            _point_at_nothing(out)
        except OSError:
            _point_at_nothing(out)
            if out is sys.stdout:
                raise


def _point_at_nothing(out: TextIO) -> None:
    """What is buffered, and what comes, is written to the null device."""
    with suppress(OSError, ValueError):  # a stream without a file
        number = out.fileno()
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, number)
        os.close(nothing)
