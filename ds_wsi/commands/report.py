"""`ds-wsi compare` and `ds-wsi report`: two runs' predictions, and many runs' tables."""

import argparse
from pathlib import Path

from ds_wsi.commands.parser import add_command
from ds_wsi.evaluation.metrics import METRIC_NAMES
from ds_wsi.runtime.bounds import MOST_RESAMPLES, MOST_SEED, whole
from ds_wsi.runtime.files import write_json
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.own_files import begins_with, require_ours
from ds_wsi.runtime.setting import comma_separated
from ds_wsi.runtime.streams import show
from ds_wsi.training.options import spellings


def add_compare(subparsers: argparse._SubParsersAction) -> None:
    """The options of `ds-wsi compare`."""
    parser = add_command(subparsers, "compare", run_compare)
    parser.add_argument("run_a", metavar="RUN_A", help="a run's folder, the baseline")
    parser.add_argument("run_b", metavar="RUN_B", help="the other run's folder")
    parser.add_argument(*spellings("output_dir"), required=True, help="folder for comparison.json")
    parser.add_argument(
        *spellings("n_resamples"), type=whole(1, MOST_RESAMPLES), default=2000, help="bootstrap draws (default: 2000)"
    )
    parser.add_argument("--seed", type=whole(0, MOST_SEED), default=0, help="seed of the bootstrap (default: 0)")


def run_compare(options: argparse.Namespace) -> None:
    """`ds-wsi compare`."""
    from ds_wsi.evaluation.comparison import comparison_to_json, format_comparison
    from ds_wsi.evaluation.tasks.comparison import compare_runs

    output_path = Path(options.output_dir) / "comparison.json"
    require_ours(output_path, lambda path: begins_with(path, '{\n  "a": '), "--output_dir")
    comparison = compare_runs(options.run_a, options.run_b, options.n_resamples, options.seed)
    content = {"a": options.run_a, "b": options.run_b, **comparison_to_json(comparison)}
    write_json(output_path, content)
    show(f"A: {options.run_a}\nB: {options.run_b}\n{format_comparison(comparison)}")
    logger.info("written: %s", output_path)


def add_report(subparsers: argparse._SubParsersAction) -> None:
    """The options of `ds-wsi report`."""
    parser = add_command(subparsers, "report", run_report)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs, or of protocols")
    parser.add_argument(
        *spellings("output_dir"), default="tables", help="results.csv, .md, .tex and .html go there (default: tables)"
    )
    parser.add_argument(
        "--metric",
        help=f"which of {', '.join(METRIC_NAMES)}, or of another task's, are shown, comma-separated (default: the one "
        "that chose the models, then auc,accuracy,quadratic_weighted_kappa; of another task its own)",
    )


def run_report(options: argparse.Namespace) -> None:
    """`ds-wsi report`."""
    from ds_wsi.evaluation.tables import FILES, write_tables

    metrics = comma_separated(options.metric) if options.metric else None
    folder = Path(options.output_dir)
    show(write_tables([Path(run) for run in options.runs], folder, metrics))
    logger.info("written: %s", ", ".join(str(folder / name) for name in FILES))
