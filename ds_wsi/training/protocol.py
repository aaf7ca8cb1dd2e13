"""A protocol: a cohort, its splits and seeds; a training for each pair, one after the other, and a table of them all.

Every run has a folder of its own, OUTPUT/<split>_seed<k>. A protocol that is started again skips what is finished and
goes on with what is not.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from ds_wsi.bags.cohort import Cohort, tile_manifest
from ds_wsi.bags.manifest import SPLITS, write_manifest
from ds_wsi.bags.prepare import read_dataset, require_own_manifest, split_dataset
from ds_wsi.bags.relabel import order_classes
from ds_wsi.bags.same_files import require_files_apart
from ds_wsi.bags.slide_policy import SlidePolicy, write_skipped
from ds_wsi.engines.accelerator.scope import Processes, launched
from ds_wsi.evaluation.tables import write_tables
from ds_wsi.runtime.log import logger
from ds_wsi.training.dataset_options import WAYS, reading_of, splitting_of
from ds_wsi.training.loop import train
from ds_wsi.training.options import settings_from
from ds_wsi.training.prepare import engine_settings
from ds_wsi.training.presets import DEFAULTS, Preset, presets_of
from ds_wsi.training.run_mark import identity, mark_started, require_same, was_finished
from ds_wsi.training.settings import TrainSettings


@dataclass(frozen=True)
class Protocol:
    """What is trained.

    Args:
        dataset: a key of `DATASETS`.
        data_dir: the dataset's folder.
        reading: options of the dataset's reader.
        splitting: arguments of `split_dataset`.
        seeds: one for each run of a split.
        preset: the name of the one that was taken.
    """

    dataset: str
    data_dir: str
    reading: Mapping[str, Any]
    splitting: Mapping[str, Any]
    seeds: tuple[int, ...]
    preset: str

    def __post_init__(self) -> None:
        """Refuse a protocol without a run."""
        if not self.seeds:
            raise ValueError("--seeds must be at least 1, got 0")


@dataclass(frozen=True)
class PlannedRun:
    """One training: the name of its split, the seed, and the name of its folder."""

    split: str
    seed: int

    @property
    def name(self) -> str:
        """The name of the folder."""
        return f"{self.split}_seed{self.seed}"


def protocol_from(
    options: argparse.Namespace, dataset: str
) -> tuple[Protocol, TrainSettings, dict[str, Any] | None, Preset]:
    """The protocol, the settings that its runs share, the DeepSpeed JSON, and the preset, from a launcher's options.

    Order: preset < DeepSpeed JSON < command line. A way of splitting that is given replaces the preset's.
    """
    presets = presets_of(dataset)
    given = vars(options)
    name = given.get("preset", DEFAULTS[dataset])
    if name not in presets:
        raise ValueError(f"--preset must be one of {', '.join(presets)}, got {name!r}. HINT: --list_presets.")
    preset = presets[name]
    ways = [way for way in (*WAYS, "split_column") if given.get(way)]
    below = {option: value for option, value in preset.protocol.items() if not (ways and option in WAYS)}
    if {"split_file", "monte_carlo_runs"} & set(ways):
        below.pop("validation_fraction", None)  # those have their own
    chosen = {**below, **given}
    for option in ("data.manifest", "data.demo", "data.demo_dir"):
        if option in given:
            raise ValueError(f"--{option.split('.')[1]} must not be given here, where slides come from --data_dir.")
    if "data.features_dir" in given:
        raise ValueError(
            "--features_dir must not be given here, where the slides themselves are read. HINT: `ds-wsi manifest` "
            "writes the same splits, and `ds-wsi train --features_dir` trains on each."
        )
    if given.get("run.resume_from_checkpoint", "latest") != "latest":
        raise ValueError("--resume_from_checkpoint must be without a path here: unfinished runs go on by themselves.")
    if chosen.get("seeds", 1) < 1:
        raise ValueError(f"--seeds must be at least 1, got {chosen['seeds']}")
    settings, config = settings_from(options, preset.settings)
    if not settings.task.is_classes:
        raise ValueError(
            f"--task must be classification in a protocol, got {settings.task.task}. HINT: `ds-wsi manifest` writes "
            "the same splits, and `ds-wsi train --manifest` trains on each."
        )
    first = settings.run.seed
    protocol = Protocol(
        dataset=dataset,
        data_dir=given["data_dir"],
        reading=reading_of(chosen),
        splitting=splitting_of(chosen),
        seeds=tuple(range(first, first + chosen.get("seeds", 1))),
        preset=name,
    )
    return protocol, settings, config, preset


def read_cohort(
    protocol: Protocol, settings: TrainSettings, tiles_dir: Path | None, *, write_grids: bool = True
) -> Cohort:
    """The protocol's cohort, read, with every slide opened and tiled.

    Args:
        protocol, settings: what `protocol_from` returned.
        tiles_dir: where grids are kept, or None.
        write_grids: False reads the grids there and writes none.

    Raises:
        ManifestError: lists everything that is wrong with the label files; else with the slides.
    """
    cohort = tile_manifest(
        read_dataset(protocol.dataset, protocol.data_dir, protocol.reading),
        settings.tilings[0],
        tiles_dir=tiles_dir,
        slide_mpp=settings.data.slide_mpp,
        workers=max(1, settings.policies.reading.workers),
        write_grids=write_grids,
        slides=SlidePolicy(
            settings.data.tissue_masks,
            settings.data.masks_in_bounds,
            settings.data.skip_bad_slides,
            reader=settings.policies.reading.slide_reader,
        ),
    )
    if tiles_dir is not None:
        write_skipped(tiles_dir.parent, cohort.skipped)
    return replace(cohort, manifest=order_classes(cohort.manifest, settings.data.classes))


def split_cohort(protocol: Protocol, cohort: Cohort) -> dict[str, Cohort]:
    """The cohort in each split, by the split's name: official, published0, fold0, draw0 and so on.

    Raises:
        ManifestError: a published split that does not fit, or too few patients.
        ValueError: no way of splitting was given, and the dataset has none; or no slides to train or to test on.
    """
    kind = next((way for way in ("split", "folds", "runs") if protocol.splitting.get(way)), "")
    if not kind and any(slide.split is None for slide in cohort.manifest.slides):
        raise ValueError(
            f"a split must be given, {cohort.manifest.source} has none of its own. "
            "HINT: --split_file, --folds, --monte_carlo_runs, or what brings the official one (see --help)."
        )
    manifests = split_dataset(cohort.manifest, **protocol.splitting)
    word = {"split": "published", "folds": "fold", "runs": "draw", "": "official"}[kind]
    names = [f"{word}{number}" for number in range(len(manifests))] if kind else [word]
    grids = dict(zip((slide.slide_id for slide in cohort.manifest.slides), cohort.tile_grids, strict=True))
    cohorts = {}
    for name, manifest in zip(names, manifests, strict=True):
        counts = {split: len(manifest.in_split(split)) for split in SPLITS}
        if not counts["train"] or not counts["test"]:
            raise ValueError(f"split {name} must have slides to train and to test on, got {counts}")
        require_files_apart(manifest)
        its_grids = tuple(grids[slide.slide_id] for slide in manifest.slides)
        cohorts[name] = Cohort(manifest, its_grids, reader=cohort.reader)
    return cohorts


def plan_runs(protocol: Protocol, splits: Sequence[str]) -> tuple[PlannedRun, ...]:
    """All pairs of split and seed, a split's seeds one after the other."""
    return tuple(PlannedRun(split, seed) for split, seed in product(splits, protocol.seeds))


def run_protocol(
    protocol: Protocol,
    settings: TrainSettings,
    deepspeed_config: dict[str, Any] | None = None,
    pretrained: str = "",
) -> str:
    """Train every run that is not finished, and write the table of all. Collective.

    OUTPUT holds `manifests/`, `tiles/` (unless --tiles_dir is given), a folder per run and the tables.

    Args:
        protocol, settings, deepspeed_config: what `protocol_from` returned.
        pretrained: what the encoder should start from; where it starts from nothing a warning names it.

    Returns:
        The table as Markdown, on the main process; elsewhere an empty string.

    Raises:
        ManifestError: lists everything that is wrong with the cohort, before anything is trained.
        ValueError: a run's folder is not this protocol's, or was made with other settings.
    """
    output_dir = Path(settings.run.output_dir or f"runs/{protocol.preset}")
    tiles_dir = Path(settings.data.tiles_dir or output_dir / "tiles")

    def prepare() -> dict[str, tuple[str, ...]]:
        if pretrained and not settings.model.has_weights:
            logger.warning(
                "the encoder starts from random weights, in the paper from %s: --encoder_weights or --pretrained",
                pretrained,
            )
        splits = split_cohort(protocol, read_cohort(protocol, settings, tiles_dir))
        for name in splits:
            require_own_manifest(_manifest_path(output_dir, name))
        for name, cohort in splits.items():
            write_manifest(cohort.manifest, _manifest_path(output_dir, name))
        return {name: cohort.manifest.classes for name, cohort in splits.items()}

    with launched(engine_settings(settings), deepspeed_config) as processes:
        classes = processes.on_main(prepare)
        runs = plan_runs(protocol, tuple(classes))
        for number, run in enumerate(runs, 1):
            settings_of_run = _settings_of(run, protocol, settings, output_dir, tiles_dir, classes[run.split])
            if processes.on_main(partial(_open, settings_of_run, deepspeed_config)):
                logger.info("run %d of %d, %s, is finished: skipped", number, len(runs), run.name)
                continue
            logger.info("run %d of %d: %s", number, len(runs), run.name)
            train(settings_of_run, deepspeed_config)
        return _table(processes, runs, settings, output_dir)


def _table(processes: Processes, runs: Sequence[PlannedRun], settings: TrainSettings, output_dir: Path) -> str:
    def write() -> str:
        first = settings.run.metric_for_best_model
        others = tuple(name for name in ("auc", "accuracy") if name != first)
        return write_tables([output_dir / run.name for run in runs], output_dir, (first, *others))

    table = processes.on_main(write)
    return table if processes.is_main else ""


def _manifest_path(output_dir: Path, split: str) -> Path:
    return output_dir / "manifests" / f"{split}.csv"


def _settings_of(
    run: PlannedRun,
    protocol: Protocol,
    settings: TrainSettings,
    output_dir: Path,
    tiles_dir: Path,
    classes: tuple[str, ...],
) -> TrainSettings:
    data = replace(
        settings.data,
        manifest=str(_manifest_path(output_dir, run.split)),
        classes=classes,
        tiles_dir=str(tiles_dir),
        dataset_name=settings.data.dataset_name or protocol.dataset,
        split_name=run.split,
    )
    run_settings = replace(
        settings.run, output_dir=str(output_dir / run.name), seed=run.seed, resume_from_checkpoint="latest"
    )
    return replace(settings, data=data, run=run_settings)


def _open(settings: TrainSettings, deepspeed_config: dict[str, Any] | None) -> bool:
    """Whether a run is finished; else its folder is made this run's, or is found to be."""
    folder = Path(str(settings.run.output_dir))
    identified = identity(settings, deepspeed_config)
    require_same(folder, identified)
    if was_finished(folder):
        return True
    mark_started(folder, identified)
    return False
