"""What the tests measure, each in a process on the simulated device: `python -m simulated_cuda.cases.<name>`."""

import json
import runpy
import sys
from typing import Any


def report(found: Any) -> None:
    """Print what was measured, as the last line."""
    sys.stdout.write(f"\n{json.dumps(found)}\n")


def run_script(path: str, *arguments: str) -> None:
    """Run a script of the project in this process, as a user would from its root.

    Raises:
        RuntimeError: it exited with another code than 0.
    """
    sys.argv = [path, *arguments]
    code: Any = 0
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        code = end.code
    if code:
        raise RuntimeError(f"{path} must end with 0, got {code} ({' '.join(arguments)})")
