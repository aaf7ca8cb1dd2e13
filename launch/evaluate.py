"""Evaluate an exported model on a cohort: see `--help`."""

import sys
from pathlib import Path

# Python puts this folder first on the path, where launch/evaluate.py would hide the library `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

from ds_wsi.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]], ends_process=True))
