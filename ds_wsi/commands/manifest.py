"""`ds-wsi manifest`: a public dataset's manifest, or another project's tables in our columns."""

import argparse
from typing import Any

from ds_wsi.bags.datasets import DATASETS
from ds_wsi.commands.parser import add_command
from ds_wsi.runtime.streams import show
from ds_wsi.runtime.words import counted
from ds_wsi.training.dataset_options import add_reading_options, add_split_options, reading_of, splitting_of
from ds_wsi.training.options import spellings

PROJECTS = ("clam", "mmp", "patho_bench", "porpoise", "stamp", "survpath")
OF_PROJECTS = ("endpoint", "time_column", "event_column", "slides_dir")
SPLITTING = ("folds", "monte_carlo_runs", "split_level", "validation_fraction", "split_seed")
SHARED = ("labels", "label_column", "split_file", "keep_listed")


def add_manifest(subparsers: argparse._SubParsersAction) -> None:
    """The options of `ds-wsi manifest`."""
    parser = add_command(subparsers, "manifest", run_manifest)
    parser.add_argument("dataset", nargs="?", choices=sorted(DATASETS), help="dataset whose slides are listed")
    parser.add_argument(*spellings("data_dir"), help="the folder into which the dataset was unpacked")
    parser.add_argument("--output", required=True, help="the CSV to write; of several splits one each, numbered")
    group = parser.add_argument_group("of another project", argument_default=argparse.SUPPRESS)
    group.add_argument(
        "--from", dest="project", choices=PROJECTS, help="whose tables --labels are; targets and folds become ours"
    )
    group.add_argument(
        "--endpoint", choices=("os", "dss", "pfi", "dfi"), help="mmp, survpath: which of the table's follow-ups"
    )
    group.add_argument(*spellings("time_column"), help="stamp: heading of the times in the clini table")
    group.add_argument(*spellings("event_column"), help="stamp: heading of its status; 1: the event came")
    group.add_argument(
        *spellings("slides_dir"), help="the folder of the slides (default: no column path, for features)"
    )
    add_reading_options(parser)
    add_split_options(parser)


def run_manifest(options: argparse.Namespace) -> None:
    """`ds-wsi manifest`."""
    from ds_wsi.bags.prepare import read_dataset, split_dataset, write_manifests
    from ds_wsi.bags.summary import cohort_table

    given = vars(options)
    if "project" in given:
        _from_project(given)
        return
    unfit = [name for name in OF_PROJECTS if name in given]
    if unfit:
        raise ValueError(f"--{unfit[0]} must be given with --from, got {given[unfit[0]]!r}. HINT: leave it out.")
    if options.dataset is None or options.data_dir is None:
        raise ValueError(
            f"manifest must be told a dataset and its --data_dir, or --from a project, got {options.dataset or 'none'}"
            f". HINT: ds-wsi manifest {options.dataset or 'custom'} --data_dir FOLDER --output cohort.csv"
        )
    manifest = read_dataset(options.dataset, options.data_dir, reading_of(given))
    manifests = split_dataset(manifest, **splitting_of(given))
    for path, written in zip(write_manifests(manifests, options.output), manifests, strict=True):
        show(f"{path}\t{counted(len(written.slides), 'slide')}\t--classes {','.join(written.classes)}")
        show(cohort_table(written))


def _from_project(given: dict[str, Any]) -> None:
    from ds_wsi.bags.projects import Asked, read_project, write_cohorts
    from ds_wsi.bags.summary import cohort_table

    taken_names = {*OF_PROJECTS, *SHARED}
    unfit = [name for name in sorted({*reading_of(given), *(set(SPLITTING) & set(given))}) if name not in taken_names]
    unfit += [name for name in ("dataset", "data_dir") if given[name] is not None]
    if unfit or "labels" not in given:
        raise ValueError(
            f"--from {given['project']} must be given with --labels TABLE, and without what it does not take, got "
            f"{', '.join(unfit) or 'no --labels'}. HINT: ds-wsi manifest --from {given['project']} --labels TABLE "
            "--output cohort.csv"
        )
    asked = Asked(
        given.get("split_file"),
        given.get("endpoint"),
        given.get("label_column"),
        given.get("time_column"),
        given.get("event_column"),
        given.get("keep_listed", False),
    )
    cohorts = read_project(given["project"], given["labels"], asked)
    for path, written in write_cohorts(cohorts, given["output"], given.get("slides_dir")):
        time, *event = written.columns.names
        how = f"--task survival --time_column {time} --event_column {event[0]}" if event else "--label_column label"
        show(f"{path}\t{counted(len(written.slides), 'slide')}\t{how}")
        show(cohort_table(written))
