"""What `evaluate` and `heatmap` share: the model, the slides that are chosen, and what both are known by."""

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ds_wsi.bags.datasets import DATASETS
from ds_wsi.commands.cohort import (
    OF_EVALUATION,
    SLIDE_OPTIONS,
    add_prediction_options,
    classes_of,
    placed,
    shard_from,
    slides_at,
    slides_of,
    tile_reading_of,
    tiling_of,
)
from ds_wsi.config import read_section
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.setting import comma_separated
from ds_wsi.targets.choices import CLASSIFICATION
from ds_wsi.training.dataset_options import add_reading_options, reading_of
from ds_wsi.training.options import add_shared_options, spellings

if TYPE_CHECKING:
    from ds_wsi.bags.bag import FailureLog
    from ds_wsi.bags.cohort import Cohort
    from ds_wsi.bags.manifest import Manifest
    from ds_wsi.bags.policy import ReadPolicy
    from ds_wsi.bags.target_columns import TargetColumns
    from ds_wsi.evaluation.protocol import EvaluationProtocol
    from ds_wsi.evaluation.shared import Sharing
    from ds_wsi.models import ModelConfig, SlideModel
    from ds_wsi.targets.task import Task

MODEL_FILES = ("config.json", "model.safetensors")
CHECKED_SLIDES, CHECKED_TILES = 8, 64  # of a model of an earlier version


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what names the model and the slides that it is run over."""
    parser.add_argument("--model", required=True, help="a run's folder, with config.json and model.safetensors")
    parser.add_argument("--dataset", choices=sorted(DATASETS), help="an external set as distributed, for --manifest")
    parser.add_argument(*spellings("data_dir"), help="the folder into which it was unpacked")
    parser.add_argument(
        *spellings("map_labels"), type=_pairs, help="the cohort's classes in the model's words: tumor=1,normal=0"
    )
    add_norm_evaluation(parser)
    add_shared_options(parser, ("allow_code",))
    add_reading_options(parser)
    add_prediction_options(parser, need_manifest=False)
    add_shared_options(parser, OF_EVALUATION, default="as the model was trained")


def add_norm_evaluation(parser: argparse.ArgumentParser) -> None:
    """Add how the norms of a model's encoder are evaluated."""
    parser.add_argument(
        *spellings("norm_evaluation"),
        choices=("running", "bag"),
        help="what its BatchNorm averages over (default: as it was exported)",
    )


def add_features_dir(parser: argparse.ArgumentParser) -> None:
    """Add the features that a model without an encoder reads."""
    parser.add_argument(
        *spellings("features_dir"), help="folder of features, one file per slide, for a model of features"
    )


def _pairs(text: str) -> dict[str, str]:
    pairs = [entry.split("=") for entry in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"must be pairs such as tumor=1,normal=0, got {text!r}")
    return {cohort_class.strip(): model_class.strip() for cohort_class, model_class in pairs}


def manifest_of(options: argparse.Namespace) -> str:
    """The manifest that the options name: given, or written from a dataset in the model's classes."""
    from ds_wsi.bags.prepare import write_external
    from ds_wsi.models import ModelConfig

    if (options.manifest is None) == (options.dataset is None):
        raise ValueError("one of --manifest and --dataset must be given. HINT: --dataset NAME --data_dir FOLDER.")
    if options.dataset is None:
        extra = [name for name in (*reading_of(vars(options)), "data_dir") if vars(options).get(name)]
        if extra:
            raise ValueError(f"--{extra[0]} must come with --dataset, got a manifest. HINT: leave it out.")
        return str(options.manifest)
    if not options.data_dir:
        raise ValueError("--data_dir must be given with --dataset, got none. HINT: the dataset's folder.")
    if options.classes:
        raise ValueError("--classes must not be given with --dataset. HINT: --map_labels says which class is which.")
    manifest = str(Path(options.output_dir) / f"{options.dataset}.csv")
    classes = ModelConfig.read(Path(options.model) / "config.json").classes
    reading = reading_of(vars(options))
    write_external(manifest, options.dataset, options.data_dir, reading, classes, options.map_labels)
    return manifest


class ModelAndSlides(NamedTuple):
    """The model that the options name, as it was exported, and the slides that they choose."""

    model: "SlideModel"
    config: "ModelConfig"
    cohort: "Cohort"


def model_and_slides(options: argparse.Namespace, split: str, labels: str) -> ModelAndSlides:
    """Read the model, and the slides with the tiles it was trained on; `labels` is as of `parse_manifest`."""
    from ds_wsi.bags.feature_cohort import load_feature_cohort
    from ds_wsi.bags.patients import by_patient, require_patients
    from ds_wsi.bags.relabel import map_labels
    from ds_wsi.bags.run_splits import read_splits, with_run_splits
    from ds_wsi.bags.scales import feature_scales
    from ds_wsi.models import load_model

    model, config = load_model(options.model, allow_code=options.allow_code)
    model.set_norms(evaluation=options.norm_evaluation)
    _require_own_classes(classes_of(options), config.classes, options.model)
    _require_features_or_slides(options, config)
    # What --dataset wrote is in the model's classes.
    mapping = options.map_labels if options.dataset is None else None
    classes = None if mapping else config.classes
    columns, of_patients = _columns_of(config), config.bag == "patient"

    def choose(manifest: "Manifest") -> "Manifest":
        manifest = map_labels(manifest, config.classes, mapping) if mapping else manifest
        if split != "all":
            manifest = with_run_splits(manifest, read_splits(Path(options.model)))
        manifest = _chosen(options, manifest, split, labels, of_patients=of_patients)
        if of_patients:
            require_patients(manifest, labels=labels)  # before slides are tiled
        return manifest

    def of_bags(cohort: "Cohort") -> ModelAndSlides:
        return ModelAndSlides(model, config, by_patient(cohort, labels=labels) if of_patients else cohort)

    if config.encoder is not None:
        tiling = tiling_of(options, read_section({"tiling": config.tiling}).tiling)
        cohort = slides_of(options, tiling, classes, labels, choose, columns)
        return of_bags(slides_at(options, cohort, tiling, config.mpps))
    of_features = partial(
        load_feature_cohort,
        options.manifest,
        check="shapes",
        classes=classes,
        workers=max(1, options.dataloader_num_workers),
        need_splits=False,
        labels=labels,
        columns=columns,
        choose=choose,
    )
    cohort = feature_scales(of_features, options.features_dir, config.mpps, config.in_dim)
    # Slides that the manifest names are read for heat maps.
    return of_bags(replace(cohort, reader=options.slide_reader))


def _columns_of(config: "ModelConfig") -> "TargetColumns":
    """The columns that the model's targets had in its training; the cohort's have the same names."""
    from ds_wsi.bags.target_columns import ONE_CLASS, TargetColumns
    from ds_wsi.targets.several import SeveralTargets

    task = config.target_task
    if task is None:
        return ONE_CLASS
    if isinstance(task, SeveralTargets):
        parts = (replace(_columns_of_task(part.task), name=part.name, classes=part.task.classes) for part in task.parts)
        return TargetColumns(task.kind, (), parts=tuple(parts))
    return _columns_of_task(task)


def _columns_of_task(task: "Task") -> "TargetColumns":
    from ds_wsi.bags.target_columns import TargetColumns

    if task.kind == "survival":
        time, event = task.columns
        return TargetColumns(task.kind, (), time, event, task.censored, task.strata_column)
    return TargetColumns(task.kind, task.columns)


def sharing_of(
    options: argparse.Namespace, model: "SlideModel", cohort: "Cohort", protocol: "EvaluationProtocol"
) -> "Sharing":
    """The work on the slides, as this process shares it with others that the options or the launcher name."""
    from ds_wsi.evaluation.shared import Sharing

    policy, failures = tile_reading_of(options, cohort)
    of_model = _of_model(options, protocol)
    known_by = [_digest([of_model, *_content(cohort, row)]) for row in range(len(cohort.grids))]
    folder = Path(options.output_dir)
    return Sharing(placed(model, options), cohort, folder, known_by, policy, failures, protocol, shard_from(options))


def made_of(options: argparse.Namespace, protocol: "EvaluationProtocol") -> dict[str, object]:
    """What an evaluation's results are made of, as far as it is known before the cohort is read."""
    from ds_wsi.runtime.fingerprint import file_fingerprint

    manifest = Path(options.manifest)
    of_manifest = file_fingerprint(manifest).sha256 if manifest.is_file() else None
    return {**_of_model(options, protocol), "manifest_sha256": of_manifest, "split": options.split}


def _of_model(options: argparse.Namespace, protocol: "EvaluationProtocol") -> dict[str, object]:
    """What decides a slide's prediction, beside the slide."""
    from ds_wsi.runtime.fingerprint import file_fingerprint

    paths = [Path(options.model) / name for name in MODEL_FILES]
    return {
        "model_sha256": [file_fingerprint(path).sha256 for path in paths if path.is_file()],
        "evaluation": asdict(protocol),
        "precision": options.precision,
        "norm_evaluation": options.norm_evaluation,
        "from_tile_store": bool(options.tile_store),
    }


def slides_digest(cohort: "Cohort", rows: Sequence[int]) -> str:
    """The digest of the evaluated slides, their labels, and what is read of them."""
    from ds_wsi.bags.feature_cohort import features_digest
    from ds_wsi.slides.fingerprint import slide_fingerprint
    from ds_wsi.slides.tiling import TileGrid

    manifest = cohort.manifest
    slides = [manifest.slides[row] for row in rows]
    named = [
        [slide.slide_id, slide.patient_id, manifest.target_words(slide), *(one.slide_id for one in slide.members)]
        for slide in slides
    ]
    if cohort.in_dim is None:
        content: object = [
            [slide_fingerprint(entry.path).sha256, grid.level, hashlib.sha256(grid.coords.tobytes()).hexdigest()]
            for entry, grid, *_ in cohort.parts(rows)
            if isinstance(grid, TileGrid)
        ]
    else:
        content = features_digest(cohort, rows)
    return _digest([named, content])


def _content(cohort: "Cohort", row: int) -> list[str]:
    """What a slide's prediction is made of; of features, whose heads were read alone, the whole file's content."""
    from ds_wsi.bags.features import FeatureFile
    from ds_wsi.runtime.fingerprint import file_fingerprint

    grids = [part.grid for part in cohort.parts([row])]
    of_file = [file_fingerprint(grid.path).sha256 for grid in grids if isinstance(grid, FeatureFile)]
    return [slides_digest(cohort, [row]), *of_file]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def tell_old_norms(
    options: argparse.Namespace,
    model: "SlideModel",
    cohort: "Cohort",
    policy: "ReadPolicy",
    failures: "FailureLog",
) -> None:
    """Warn of a model of an earlier version whose running statistics are not what it was trained with.

    It is measured on slides with labels; where there is none, the warning says that nothing could be measured.
    """
    from ds_wsi.bags.bag import BagPart
    from ds_wsi.evaluation.norm_choice import NormPlan, norm_gap
    from ds_wsi.evaluation.predict import NormVariant
    from ds_wsi.models.config import NORMS_SINCE, stored_version
    from ds_wsi.norms import batch_norms

    of_before = options.norm_evaluation is None and stored_version(options.model) < NORMS_SINCE
    if not (of_before and batch_norms(model.encoder)):
        return
    slides = cohort.manifest.slides
    rows = [row for row, slide in enumerate(slides) if slide.label is not None][:CHECKED_SLIDES]
    some = tuple(BagPart(row, 0, min(cohort.lengths[row], CHECKED_TILES)) for row in rows)
    if not some:
        logger.warning(
            "%s was exported by an earlier version, with running statistics of BatchNorm, which need not be what it "
            "was trained with; without labels nothing can be compared. HINT: ds-wsi evaluate of slides with labels.",
            options.model,
        )
        return
    gap = norm_gap(
        model, slides, cohort.grids, policy, failures, NormPlan(training="bag", gap=some), NormVariant("running")
    )
    if gap is not None and gap.is_wide:
        logger.warning(
            "%s was exported by an earlier version, with running statistics of BatchNorm: on %d slides its loss is "
            "%.4g, with each slide's own statistics, as it was trained, %.4g. HINT: --norm_evaluation bag.",
            *(options.model, len(some), gap.exported, gap.trained),
        )


def _require_features_or_slides(options: argparse.Namespace, config: "ModelConfig") -> None:
    """Refuse features for a model that reads slides, and their lack; name options that have no effect on them."""
    if config.encoder is None and not options.features_dir:
        raise ValueError(f"--features_dir must be given for a model of features, got none ({options.model})")
    if config.encoder is not None and options.features_dir:
        raise ValueError(
            f"--features_dir must not be given for a model with an encoder, got {options.features_dir} "
            f"({options.model}, {config.encoder}). HINT: leave it out, the model reads slides."
        )
    unused = [name for name in (*SLIDE_OPTIONS, *OF_EVALUATION) if vars(options).get(name)]
    if config.encoder is None and unused:
        logger.warning("%s: without effect on features", ", ".join(f"--{name}" for name in unused))


def _require_own_classes(given: Sequence[str] | None, classes: Sequence[str], model: str) -> None:
    """Refuse names of classes, or an order of them, that are not the model's: its logits would get others' names."""
    if given is not None and tuple(given) != tuple(classes):
        raise ValueError(
            f"--classes must be the model's, in their order, {', '.join(classes)}, got {', '.join(given)} ({model}). "
            "HINT: leave it out; --map_labels says which of them the cohort's labels are."
        )


def _chosen(
    options: argparse.Namespace, manifest: "Manifest", split: str, labels: str, *, of_patients: bool = False
) -> "Manifest":
    """The manifest of the slides that the options choose; in bags of patients with the other slides of theirs.

    Raises:
        ValueError: --slide_ids or --split names none; or, where labels are used, some of the slides have none.
    """
    slides = manifest.slides
    slide_ids = vars(options).get("slide_ids")
    if slide_ids:
        ids = comma_separated(slide_ids)
        unknown = set(ids) - {slide.slide_id for slide in slides}
        if unknown:
            near = {name for wrong in unknown for name in get_close_matches(wrong, [s.slide_id for s in slides], 1)}
            hint = f"did you mean {', '.join(sorted(near))}?" if near else "the manifest's column slide_id has them."
            raise ValueError(f"--slide_ids must be of the manifest, got {', '.join(sorted(unknown))}. HINT: {hint}")
        chosen = tuple(slide for slide in slides if slide.slide_id in ids)
        if of_patients:
            patients = {slide.patient_id for slide in chosen}
            chosen = tuple(slide for slide in slides if slide.patient_id in patients)
            logger.info("bags are of patients: %d slides of %d patients", len(chosen), len(patients))
        return replace(manifest, slides=chosen)
    chosen = tuple(slide for slide in slides if split in ("all", slide.split))
    if not chosen:
        raise ValueError(f"--split must name slides of the manifest, got {split!r}, which has none. HINT: --split all.")
    without = [slide.slide_id for slide in chosen if slide.label is None]
    if manifest.kind == CLASSIFICATION and labels == "optional" and 0 < len(without) < len(chosen):
        shown = ", ".join(without[:5]) + (", ..." if len(without) > 5 else "")
        raise ValueError(
            f"labels must be there for all slides of a metric, got none for {len(without)} of {len(chosen)} "
            f"({shown}; {manifest.source}). HINT: fill them in, take the rows out, or leave the column out: all slides "
            "are then predicted, without metrics."
        )
    return replace(manifest, slides=chosen)
