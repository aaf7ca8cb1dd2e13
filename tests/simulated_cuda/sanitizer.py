"""torch's CUDA sanitizer, which follows what streams wait for and refuses two accesses that nothing keeps in order."""

from collections.abc import Iterable
from itertools import islice
from traceback import FrameSummary, StackSummary, walk_stack
from types import FrameType, SimpleNamespace
from typing import Any

from torch.cuda import _sanitizer

_FRAMES = 12  # of each access: all of them would take most of a test's time


def enable() -> None:
    """Watch every operation of this process from here on; a race raises `CUDASanitizerErrors`."""
    module: Any = _sanitizer
    module.traceback = SimpleNamespace(StackSummary=_Innermost, walk_stack=walk_stack)
    _sanitizer.enable_cuda_sanitizer()


class _Innermost:
    """What takes the place of `StackSummary`: the innermost frames, whose lines are read where one is printed."""

    @staticmethod
    def extract(frames: Iterable[tuple[FrameType, int]], lookup_lines: bool) -> StackSummary:
        innermost = islice(frames, _FRAMES)
        codes = [(frame.f_code, line) for frame, line in innermost]
        kept = [FrameSummary(code.co_filename, line, code.co_name, lookup_line=lookup_lines) for code, line in codes]
        return StackSummary.from_list(kept)
