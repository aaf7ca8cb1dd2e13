"""Measurements: `launch/benchmark.py NAME [--quick] [--check] [--output_dir DIR]`.

Each benchmark writes NAME.json (with the environment), NAME.md and NAME.png; `--check` exits 1 and names every bound of
the README's table that does not hold. One that is asked to end by a signal takes down what it has set up and exits 75.
"""

import argparse
import sys
from pathlib import Path

# Python puts this folder first on the path, where launch/evaluate.py would hide the library `evaluate`.
# The folder above takes its place, because `launch.benchmarks` is not installed.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [str(_HERE.parent), *(entry for entry in sys.path if Path(entry).resolve() not in (_HERE, _HERE.parent))]

from ds_wsi.runtime.log import logger, setup_logging  # noqa: E402
from ds_wsi.runtime.signals import STATUS, Stopped, heeding_signals  # noqa: E402
from launch.benchmarks import (  # noqa: E402
    beside_local,
    compression,
    equivalence,
    partition,
    partition_gpu,
    protocol,
    scaling,
    small_steps,
    stacking,
    store,
    sweep,
    tiles,
)
from launch.benchmarks.table import write_result  # noqa: E402

BENCHMARKS = {
    "compression": compression,
    "equivalence": equivalence,
    "local_updates": beside_local,
    "partition": partition,
    "partition_gpu": partition_gpu,
    "protocol": protocol,
    "scaling": scaling,
    "small_steps": small_steps,
    "stacking": stacking,
    "store": store,
    "sweep": sweep,
    "tiles": tiles,
}


def main() -> int:
    """Run one benchmark; 1 where `--check` finds a bound that does not hold."""
    setup_logging()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="smaller: a few minutes on two cores")
    parser.add_argument("--check", action="store_true", help="exit 1 where a bound does not hold")
    parser.add_argument("--output_dir", "--output-dir", default="launch/results", help="of the three files")
    parser.add_argument("--slide", action="append", default=[], help="tiles: a slide of yours to read as well")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the benchmark, such as repeats=3"
    )
    options = parser.parse_args()
    unpaired = [text for text in options.option if "=" not in text]
    if unpaired:
        parser.error(f"--option must be NAME=VALUE, got {unpaired[0]!r}")
    given = dict(text.split("=", 1) for text in options.option)
    try:
        with heeding_signals():
            result = BENCHMARKS[options.name].measure(quick=options.quick, slides=options.slide, options=given)
    except Stopped as stopped:  # on its way here it has taken down what it had set up
        logger.info("%s: nothing was written", stopped)
        return STATUS
    write_result(options.name, result, Path(options.output_dir))
    broken = [bound for bound in result.bounds if not bound.holds]
    for bound in result.bounds:
        print(f"{'holds' if bound.holds else 'BROKEN'}: {bound.words}, measured {bound.measured:.3f}")
    return 1 if options.check and broken else 0


if __name__ == "__main__":
    sys.exit(main())
