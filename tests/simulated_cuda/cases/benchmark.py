"""`launch/benchmark.py partition_gpu --quick`, with an image and a bag that offload: `python -m ... <folder>`.

Rates are assumed: measuring the simulated device's takes minutes, and they would be the CPU's.
"""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ds_wsi.partition import PartitionPolicy
from ds_wsi.partition.planning.rates import ASSUMED
from launch.benchmarks import gpu_bags, partition_gpu
from simulated_cuda.cases import report, run_script

PARTS = "image,bags"  # test_modes.py has what "exact" has; the others take long


def main(folder: Path) -> None:
    """Run the script; what it wrote."""
    module: Any = partition_gpu
    bags: Any = gpu_bags
    module.probe = lambda device: ASSUMED[device.type]
    module.QUICK_GPU = replace(module.QUICK_GPU, bags=(24,))
    bags.PartitionPolicy = partial(PartitionPolicy, mode="offload", chunk_size=8)
    options = (f"parts={PARTS}", "mode=offload", f"rows={folder / 'rows.json'}")
    given = [word for option in options for word in ("--option", option)]
    run_script("launch/benchmark.py", "partition_gpu", "--quick", "--output_dir", str(folder), *given)
    report(json.loads((folder / "partition_gpu.json").read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
