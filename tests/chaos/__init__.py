"""Faults at bad moments, as data: `python -m tests.chaos.campaign`; the runs they hit are those of tests/unit."""

import sys
from pathlib import Path

_TINY_RUNS = str(Path(__file__).resolve().parents[1] / "unit")
if _TINY_RUNS not in sys.path:  # pytest has it; the command has not
    sys.path.append(_TINY_RUNS)
