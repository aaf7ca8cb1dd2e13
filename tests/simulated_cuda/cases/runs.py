"""Whole training runs, one after the other in one process: imports take longer than they do.

`python -m simulated_cuda.cases.runs <folder> <JSON: name -> options>`
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_wsi.evaluation import heatmap
from simulated_cuda.cases import report, run_script

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def train(options: list[str], folder: Path) -> dict[str, Any]:
    """What `launch/train.py` leaves in its history; the device's memory at most."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run_script("launch/train.py", *options, "--output_dir", str(folder))
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in LAUNCHER:  # the next run is not this one's rank
        os.environ.pop(name, None)
    last = json.loads((folder / "history.json").read_text(encoding="utf-8"))[-1]
    allocated = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"train_loss": last["train_loss"], "eval_loss": last["eval_loss"], "allocated": allocated}


def main(folder: Path, runs: dict[str, list[str]]) -> None:
    """Train each."""
    heatmap.DPI = 20  # or drawing would take as long as training
    report({name: train(options, folder / name) for name, options in runs.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
