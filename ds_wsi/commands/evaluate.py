"""`ds-wsi evaluate` and `ds-wsi heatmap`: what an exported model says of a cohort."""

import argparse
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ds_wsi.bags.datasets import DATASETS
from ds_wsi.commands.cohort import (
    OF_EVALUATION,
    SLIDE_OPTIONS,
    add_prediction_options,
    classes_of,
    placed,
    slides_of,
    tell_left_out,
    tile_reading_of,
    tiling_of,
)
from ds_wsi.commands.parser import add_command
from ds_wsi.config import read_section
from ds_wsi.runtime.choices import precision_words
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.setting import comma_separated, tiles_or_all
from ds_wsi.training.dataset_options import add_reading_options, reading_of
from ds_wsi.training.options import add_local_rank, add_shared_options, spellings

MODEL_FILES = ("config.json", "model.safetensors")
TILES = "number of random tiles of each slide, such as 256, or all (default: all)"
CHECKED_SLIDES, CHECKED_TILES = 8, 64  # of a model of an earlier version

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ds_wsi.bags.bag import FailureLog
    from ds_wsi.bags.cohort import Cohort
    from ds_wsi.bags.manifest import Manifest
    from ds_wsi.bags.policy import ReadPolicy
    from ds_wsi.bags.slide_policy import SkippedSlide
    from ds_wsi.engines.accelerator.scope import Processes
    from ds_wsi.evaluation.protocol import EvaluationProtocol
    from ds_wsi.models import SlideModel


def add_evaluate(subparsers: argparse._SubParsersAction) -> None:
    """The options of `ds-wsi evaluate`."""
    parser = add_command(subparsers, "evaluate", run_evaluate)
    _add_model_options(parser)
    parser.add_argument("--split", default="test", help="split of the manifest, or `all` (default: test)")
    parser.add_argument(*spellings("eval_tiles"), type=tiles_or_all, help=TILES)
    parser.add_argument(*spellings("eval_runs"), type=int, default=1, help="draws of --eval_tiles (default: 1)")
    parser.add_argument(*spellings("eval_seed"), type=int, default=0, help="seed of the draws (default: 0)")
    parser.add_argument(*spellings("dataset_name"), help="name in tables of runs (default: the manifest's)")
    _add_features_dir(parser)
    add_local_rank(parser)


def run_evaluate(options: argparse.Namespace) -> None:
    """`ds-wsi evaluate`, and launch/evaluate.py under any launcher, whose processes share the slides."""
    from ds_wsi.engines.accelerator.scope import launched_processes

    with launched_processes() as processes:
        _evaluate(options, processes)


def _evaluate(options: argparse.Namespace, processes: "Processes") -> None:
    from ds_wsi.bags.run_splits import read_splits, warn_of_overlap
    from ds_wsi.bags.slide_policy import skipped_words
    from ds_wsi.evaluation.folder import mark, require_no_run, require_same_evaluation
    from ds_wsi.evaluation.protocol import EvaluationProtocol
    from ds_wsi.evaluation.record import RunFolderError, RunRecord
    from ds_wsi.evaluation.results import REPORT, write_predictions, write_results
    from ds_wsi.runtime.environment import command_line
    from ds_wsi.runtime.temporary import remove_left_behind
    from ds_wsi.training.run_folder import is_run_folder

    directory = Path(options.output_dir)
    processes.on_main(lambda: require_no_run(directory, is_run_folder(directory)))
    options.manifest = processes.on_main(partial(_manifest_of, options))
    protocol = EvaluationProtocol(options.eval_tiles, options.eval_runs, options.eval_seed)
    made_of = processes.on_main(partial(_made_of, options, protocol))
    processes.on_main(lambda: require_same_evaluation(directory, made_of))
    record = None
    if processes.is_main:
        try:
            record = RunRecord.read(Path(options.model))
        except RunFolderError as error:
            logger.warning("%s: %s. `ds-wsi report` will have no place for this evaluation.", options.model, error)
        for folder in (directory, directory / "tiles", directory / "heatmaps"):
            remove_left_behind(folder)

    def check(cohort: "Cohort") -> None:
        made_of["slides"] = _slides_digest(cohort, range(len(cohort.grids)))
        require_same_evaluation(directory, made_of)
        warn_of_overlap(cohort.manifest.slides, read_splits(Path(options.model)))

    cohort, predictions, failures = _predictions(options, options.split, protocol, processes, "optional", check)
    if not processes.is_main:
        return
    mark(directory, made_of)
    if all(slide.label is None for slide in cohort.manifest.slides):
        write_predictions(directory, cohort, predictions)
        return
    write_results(
        directory,
        cohort,
        predictions,
        title=f"{options.model} on {options.manifest}",
        summary={
            "command": command_line(),
            "model": options.model,
            "cohort": options.manifest,
            "split": options.split,
            **skipped_words(cohort.skipped),
            "evaluation": f"{protocol}, encoder in {precision_words(options.precision)}",
        },
        failures=failures,
        protocol=protocol,
        split=options.split,
        dataset=options.dataset_name or Path(options.manifest).stem,
        tell=print,
    )
    if record is not None:
        dataset = options.dataset_name or Path(options.manifest).stem
        record.evaluated_on(dataset, options.split, protocol, options.precision).write(directory)
    logger.info("written: %s, with metrics.json and predictions.csv beside it", directory / REPORT)
    tell_left_out(cohort, directory)


def _made_of(options: argparse.Namespace, protocol: "EvaluationProtocol") -> dict[str, object]:
    """What an evaluation's results are made of, as far as it is known before the cohort is read."""
    from dataclasses import asdict

    from ds_wsi.runtime.fingerprint import file_fingerprint

    model, manifest = Path(options.model), Path(options.manifest)
    digests = [file_fingerprint(path).sha256 for name in MODEL_FILES if (path := model / name).is_file()]
    return {
        "model_sha256": digests,
        "manifest_sha256": file_fingerprint(manifest).sha256 if manifest.is_file() else None,
        "split": options.split,
        "evaluation": asdict(protocol),
        "precision": options.precision,
        "norm_evaluation": options.norm_evaluation,
        "from_tile_store": bool(options.tile_store),
    }


def _slides_digest(cohort: "Cohort", rows: "Sequence[int]") -> str:
    """The digest of the evaluated slides, their labels, and what is read of them."""
    import hashlib
    import json

    from ds_wsi.bags.feature_cohort import features_digest
    from ds_wsi.slides.fingerprint import slide_fingerprint

    manifest = cohort.manifest
    slides = [manifest.slides[row] for row in rows]
    named = [[slide.slide_id, slide.patient_id, manifest.label_name(slide)] for slide in slides]
    if cohort.in_dim is None:
        grids = [cohort.tile_grids[row] for row in rows]
        content: object = [
            [slide_fingerprint(slide.path).sha256, grid.level, hashlib.sha256(grid.coords.tobytes()).hexdigest()]
            for slide, grid in zip(slides, grids, strict=True)
        ]
    else:
        content = features_digest(cohort, rows)
    return hashlib.sha256(json.dumps([named, content]).encode()).hexdigest()[:16]


def add_heatmap(subparsers: argparse._SubParsersAction) -> None:
    """The options of `ds-wsi heatmap`."""
    parser = add_command(subparsers, "heatmap", run_heatmap)
    _add_model_options(parser)
    parser.add_argument(*spellings("slide_ids"), help="ids of slides, comma-separated (default: all slides)")
    _add_features_dir(parser)


def run_heatmap(options: argparse.Namespace) -> None:
    """`ds-wsi heatmap`."""
    from ds_wsi.engines.accelerator.scope import Processes
    from ds_wsi.evaluation.heatmap import is_heat_map
    from ds_wsi.evaluation.protocol import EvaluationProtocol
    from ds_wsi.evaluation.results import draw_heatmaps
    from ds_wsi.runtime.own_files import require_ours

    options.manifest = _manifest_of(options)
    directory = Path(options.output_dir)

    def check(cohort: "Cohort") -> None:
        for slide in cohort.manifest.slides:
            require_ours(directory / f"{slide.slide_id}.png", is_heat_map, "--output_dir")

    cohort, predictions, _ = _predictions(options, "all", EvaluationProtocol(), Processes(0, 1), "unused", check)
    for _, path in draw_heatmaps(directory, cohort, predictions):
        print(path)
    tell_left_out(cohort, options.output_dir)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a run's folder, with config.json and model.safetensors")
    parser.add_argument("--dataset", choices=sorted(DATASETS), help="an external set as distributed, for --manifest")
    parser.add_argument(*spellings("data_dir"), help="the folder into which it was unpacked")
    parser.add_argument(
        *spellings("map_labels"), type=_pairs, help="the cohort's classes in the model's words: tumor=1,normal=0"
    )
    parser.add_argument(
        *spellings("norm_evaluation"),
        choices=("running", "bag"),
        help="what its BatchNorm averages over (default: as it was exported)",
    )
    add_reading_options(parser)
    add_prediction_options(parser, need_manifest=False)
    add_shared_options(parser, OF_EVALUATION, default="as the model was trained")


def _add_features_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        *spellings("features_dir"), help="folder of features, one file per slide, for a model of features"
    )


def _pairs(text: str) -> dict[str, str]:
    pairs = [entry.split("=") for entry in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"must be pairs such as tumor=1,normal=0, got {text!r}")
    return {cohort_class.strip(): model_class.strip() for cohort_class, model_class in pairs}


def _manifest_of(options: argparse.Namespace) -> str:
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


def _predictions(
    options: argparse.Namespace,
    split: str,
    protocol: "EvaluationProtocol",
    processes: "Processes",
    labels: str,
    check: "Callable[[Cohort], None]",
) -> tuple:
    """Predict the slides that the options choose with an exported model, on the tiles it was trained on. Collective.

    The processes share the slides by their tiles, and each has all predictions, in the cohort's order, which is of
    those slides alone. `labels` is as of `parse_manifest`. `check` is called with the cohort on the main process before
    the first slide is read.
    """
    from ds_wsi.bags.feature_cohort import load_feature_cohort
    from ds_wsi.bags.relabel import map_labels
    from ds_wsi.bags.run_splits import read_splits, with_run_splits
    from ds_wsi.bags.sampler import deal_by_cost
    from ds_wsi.evaluation.predict import predict_slides
    from ds_wsi.models import load_model
    from ds_wsi.models.config import NORMS_SINCE, stored_version

    model, config = load_model(options.model)
    model.set_norms(evaluation=options.norm_evaluation)
    _require_own_classes(classes_of(options), config.classes, options.model)
    if config.encoder is None and not options.features_dir:
        raise ValueError(f"--features_dir must be given for a model of features, got none ({options.model})")
    if config.encoder is not None and options.features_dir:
        raise ValueError(
            f"--features_dir must not be given for a model with an encoder, got {options.features_dir} "
            f"({options.model}, {config.encoder}). HINT: leave it out, the model reads slides."
        )

    if config.encoder is None:
        unused = [name for name in (*SLIDE_OPTIONS, *OF_EVALUATION) if vars(options).get(name)]
        if unused:
            logger.warning("%s: without effect on features", ", ".join(f"--{name}" for name in unused))

    # What --dataset wrote is in the model's classes.
    mapping = options.map_labels if options.dataset is None else None
    classes = None if mapping else config.classes

    def choose(manifest: "Manifest") -> "Manifest":
        manifest = map_labels(manifest, config.classes, mapping) if mapping else manifest
        if split != "all":
            manifest = with_run_splits(manifest, read_splits(Path(options.model)))
        return _chosen(options, manifest, split, labels)

    def load(skipped: "tuple[SkippedSlide, ...] | None") -> "Cohort":
        if config.encoder is not None:
            tiling = tiling_of(options, read_section({"tiling": config.tiling}).tiling)
            return slides_of(options, tiling, classes, labels, choose, skipped)
        return load_feature_cohort(
            options.manifest,
            options.features_dir,
            in_dim=config.in_dim,
            check="shapes",
            classes=classes,
            workers=max(1, options.dataloader_num_workers),
            need_splits=False,
            labels=labels,
            choose=choose,
        )

    # The main process tiles the slides, and says which of them are left out.
    cohort = processes.main_first(load, lambda cohort: cohort.skipped)
    processes.on_main(lambda: check(cohort))
    rows = range(len(cohort.grids))
    rows_here = deal_by_cost(cohort.lengths, processes.world_size)[processes.rank]
    policy, failures = tile_reading_of(options, cohort)
    slides = cohort.manifest.slides
    stream = predict_slides(placed(model, options), slides, cohort.grids, rows_here, policy, failures, protocol)
    predictions = [slide for share in processes.gather(list(stream)) for slide in share]
    if processes.is_main and options.norm_evaluation is None and stored_version(options.model) < NORMS_SINCE:
        _check_norms(options.model, model, cohort, rows, policy, failures)
    for reasons in processes.gather(failures.reasons):
        failures.reasons.update(reasons)
    failures.check()
    return cohort, sorted(predictions, key=lambda prediction: prediction.slide), failures.rows()


def _check_norms(
    folder: str,
    model: "SlideModel",
    cohort: "Cohort",
    rows: "Sequence[int]",
    policy: "ReadPolicy",
    failures: "FailureLog",
) -> None:
    """Warn of a model of an earlier version whose running statistics are not what it was trained with."""
    from ds_wsi.bags.bag import BagPart
    from ds_wsi.evaluation.norm_choice import NormPlan, norm_gap
    from ds_wsi.evaluation.predict import NormVariant
    from ds_wsi.norms import batch_norms

    if not batch_norms(model.encoder):
        return
    some = tuple(BagPart(row, 0, min(cohort.lengths[row], CHECKED_TILES)) for row in rows[:CHECKED_SLIDES])
    plan, exported = NormPlan(training="bag", gap=some), NormVariant("running")
    gap = norm_gap(model, cohort.manifest.slides, cohort.grids, policy, failures, plan, exported)
    if gap.is_wide:
        logger.warning(
            "%s was exported by an earlier version, with running statistics of BatchNorm: on %d slides its loss is "
            "%.4g, with each slide's own statistics, as it was trained, %.4g. HINT: --norm_evaluation bag.",
            *(folder, len(some), gap.exported, gap.trained),
        )


def _require_own_classes(given: "Sequence[str] | None", classes: "Sequence[str]", model: str) -> None:
    """Refuse names of classes, or an order of them, that are not the model's: its logits would get others' names."""
    if given is not None and tuple(given) != tuple(classes):
        raise ValueError(
            f"--classes must be the model's, in their order, {', '.join(classes)}, got {', '.join(given)} ({model}). "
            "HINT: leave it out; --map_labels says which of them the cohort's labels are."
        )


def _chosen(options: argparse.Namespace, manifest: "Manifest", split: str, labels: str) -> "Manifest":
    """The manifest of the slides that the options choose.

    Raises:
        ValueError: --slide_ids or --split names none; or, where labels are used, some of the slides have none.
    """
    slides = manifest.slides
    slide_ids = getattr(options, "slide_ids", None)
    if slide_ids:
        ids = comma_separated(slide_ids)
        unknown = set(ids) - {slide.slide_id for slide in slides}
        if unknown:
            near = {name for wrong in unknown for name in get_close_matches(wrong, [s.slide_id for s in slides], 1)}
            hint = f"did you mean {', '.join(sorted(near))}?" if near else "the manifest's column slide_id has them."
            raise ValueError(f"--slide_ids must be of the manifest, got {', '.join(sorted(unknown))}. HINT: {hint}")
        return replace(manifest, slides=tuple(slide for slide in slides if slide.slide_id in ids))
    chosen = tuple(slide for slide in slides if split in ("all", slide.split))
    if not chosen:
        raise ValueError(f"--split must name slides of the manifest, got {split!r}, which has none. HINT: --split all.")
    without = [slide.slide_id for slide in chosen if slide.label is None]
    if labels == "optional" and 0 < len(without) < len(chosen):
        shown = ", ".join(without[:5]) + (", ..." if len(without) > 5 else "")
        raise ValueError(
            f"labels must be there for all slides of a metric, got none for {len(without)} of {len(chosen)} "
            f"({shown}; {manifest.source}). HINT: fill them in, take the rows out, or leave the column out: all slides "
            "are then predicted, without metrics."
        )
    return replace(manifest, slides=chosen)
