"""Train on CAMELYON17: see `--help`, `--list_presets`, and docs/how_to/papers.md.

accelerate launch launch/train_camelyon17.py --data_dir DIR --corrections CSV
"""

import sys
from pathlib import Path

# Python puts this folder first on the path, where launch/evaluate.py would hide the library `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

from ds_wsi.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["protocol", "camelyon17", *sys.argv[1:]], ends_process=True))
