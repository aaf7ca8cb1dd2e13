"""Options of what reads and splits a dataset: the same names in the launchers, `ds-wsi manifest` and `evaluate`."""

import argparse
import inspect
from collections.abc import Mapping
from typing import Any

from ds_wsi.bags.datasets import DATASETS
from ds_wsi.bags.datasets.corrections import TARGETS
from ds_wsi.bags.splits import LEVELS
from ds_wsi.runtime.setting import comma_separated
from ds_wsi.training.options import spellings
from ds_wsi.training.presets import presets_of

# Option of a reader -> its help; `True` where it is a switch, choices where it has some.
READING: Mapping[str, tuple[str, Any]] = {
    "labels": ("its label file (default: where the dataset has it)", str),
    "drop": ("list of noisy slides to leave out", str),
    "missing_ok": ("leave out rows without an image", True),
    "target": ("the classes", tuple(TARGETS)),
    "corrections": ("labels that override the official ones", str),
    "test_centers": ("centers that are the test split, such as 3,4", comma_separated),
    "one_per_patient": ("each patient's first slide", True),
    "slide_column": ("heading of the slide", str),
    "label_column": ("heading of the label", str),
    "patient_column": ("heading of the patient (default: each slide is one)", str),
    "split_column": ("heading of the split (default: splits are drawn)", str),
    "mpp_column": ("heading of the resolution, um/px, where files do not tell it", str),
}
WAYS = ("split_file", "folds", "monte_carlo_runs")


def reading_names(dataset: str) -> tuple[str, ...]:
    """The options of a dataset's reader."""
    return tuple(inspect.signature(DATASETS[dataset]).parameters)[1:]


def add_reading_options(parser: argparse.ArgumentParser, dataset: str | None = None) -> None:
    """Add a reader's options, or with None those of all readers; what is not given is absent from the namespace."""
    group = parser.add_argument_group("of the dataset", argument_default=argparse.SUPPRESS)
    for name, (text, kind) in READING.items():
        readers = [reader for reader in DATASETS if name in reading_names(reader)]
        if dataset is not None and dataset not in readers:
            continue
        whose = "" if dataset or readers == list(DATASETS) else f"{', '.join(readers)}: "
        if kind is True:
            group.add_argument(*spellings(name), action="store_true", help=whose + text)
        elif isinstance(kind, tuple):
            group.add_argument(*spellings(name), choices=kind, help=whose + text)
        else:
            group.add_argument(*spellings(name), type=kind, help=whose + text)


def add_split_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `split_dataset`; what is not given is absent from the namespace."""
    group = parser.add_argument_group("splits (default: the official one)", argument_default=argparse.SUPPRESS)
    group.add_argument(*spellings("split_file"), help="CLAM's CSV, PANTHER's folder, or a folder of folds of either")
    group.add_argument("--folds", type=int, help="draw folds by patient")
    group.add_argument(*spellings("monte_carlo_runs"), type=int, help="draw so many Monte-Carlo splits by patient")
    group.add_argument(
        *spellings("split_level"), choices=LEVELS, help="slide: as some papers split, with leakage (default: patient)"
    )
    group.add_argument(*spellings("keep_listed"), action="store_true", help="drop slides that --split_file names not")
    group.add_argument(*spellings("validation_fraction"), type=float, help="share of training patients (default: 0)")
    group.add_argument(*spellings("split_seed"), type=int, help="seed of what is drawn (default: 0)")


def reading_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The readers' options among those given."""
    return {name: value for name, value in options.items() if name in READING}


def splitting_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `split_dataset` among those given."""
    names = {
        "split_file": "split",
        "folds": "folds",
        "monte_carlo_runs": "runs",
        "split_level": "level",
        "keep_listed": "keep_listed",
        "validation_fraction": "validation_fraction",
        "split_seed": "seed",
    }
    return {argument: options[name] for name, argument in names.items() if name in options}


def add_protocol_options(parser: argparse.ArgumentParser, dataset: str) -> None:
    """Add what a dataset's launcher takes beside the train options; what is not given is absent."""
    group = parser.add_argument_group("protocol", argument_default=argparse.SUPPRESS)
    group.add_argument(*spellings("data_dir"), help="the folder into which the dataset was unpacked")
    names = list(presets_of(dataset))
    group.add_argument("--preset", choices=names, help=f"the values to start from (default: {names[0]})")
    group.add_argument(*spellings("list_presets"), action="store_true", help="print the presets and exit")
    group.add_argument("--seeds", type=int, help="trainings of each split, from --seed on (default: the preset's)")
    add_reading_options(parser, dataset)
    add_split_options(parser)
