"""Train a slide model end to end: see `--help`, and docs/how_to/gpus.md for the launchers.

deepspeed launch/train.py --deepspeed ds_configs/offload.json
"""

import sys
from pathlib import Path

# Python puts this folder first on the path, where launch/evaluate.py would hide the library `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

from ds_wsi.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], ends_process=True))
