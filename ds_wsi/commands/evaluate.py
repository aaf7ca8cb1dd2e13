"""`ds-wsi evaluate` and `ds-wsi heatmap`: what an exported model says of a cohort."""

import argparse
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
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.numerics import precision_words
from ds_wsi.training.dataset_options import add_reading_options, reading_of
from ds_wsi.training.options import add_local_rank, add_shared_options, comma_separated, spellings, tiles_or_all

CHECKED_SLIDES, CHECKED_TILES = 8, 64  # of a model of an earlier version

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ds_wsi.bags.bag import FailureLog, ReadPolicy
    from ds_wsi.bags.cohort import Cohort
    from ds_wsi.bags.slide_policy import SkippedSlide
    from ds_wsi.engines.scope import Processes
    from ds_wsi.evaluation.protocol import EvaluationProtocol
    from ds_wsi.models import SlideModel


def add_evaluate(subparsers: argparse._SubParsersAction) -> None:
    """The options of `ds-wsi evaluate`."""
    parser = add_command(subparsers, "evaluate", run_evaluate, "evaluate an exported model on a cohort")
    _add_model_options(parser)
    parser.add_argument("--split", default="test", help="of the manifest, or `all` (default: test)")
    parser.add_argument(*spellings("eval_tiles"), type=tiles_or_all, help="random tiles of each slide (default: all)")
    parser.add_argument(*spellings("eval_runs"), type=int, default=1, help="draws of them (default: 1)")
    parser.add_argument(*spellings("eval_seed"), type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument(*spellings("dataset_name"), help="in tables of runs (default: the manifest's name)")
    _add_features_dir(parser)
    add_local_rank(parser)


def run_evaluate(options: argparse.Namespace) -> None:
    """`ds-wsi evaluate`, and launch/evaluate.py under any launcher, whose processes share the slides."""
    from ds_wsi.engines.scope import launched_processes

    with launched_processes() as processes:
        _evaluate(options, processes)


def _evaluate(options: argparse.Namespace, processes: "Processes") -> None:
    from ds_wsi.bags.slide_policy import skipped_words
    from ds_wsi.evaluation.protocol import EvaluationProtocol
    from ds_wsi.evaluation.record import FILE_NAME as RECORD_FILE
    from ds_wsi.evaluation.record import RunFolderError, RunRecord
    from ds_wsi.evaluation.results import write_results

    options.manifest = processes.on_main(partial(_manifest_of, options))
    protocol = EvaluationProtocol(options.eval_tiles, options.eval_runs, options.eval_seed)
    directory = Path(options.output_dir)
    record = None
    if processes.is_main:
        try:
            record = RunRecord.read(Path(options.model))
        except RunFolderError as error:
            logger.warning("%s: %s. `ds-wsi report` will have no place for this evaluation.", options.model, error)
        (directory / RECORD_FILE).unlink(missing_ok=True)  # of an earlier evaluation: until this one ends, it has none
    cohort, predictions, failures = _predictions(options, options.split, protocol, processes)
    if not processes.is_main:
        return
    write_results(
        directory,
        cohort,
        predictions,
        title=f"{options.model} on {options.manifest}",
        summary={
            "model": options.model,
            "cohort": options.manifest,
            "split": options.split,
            **skipped_words(cohort.skipped),
            "evaluation": f"{protocol}, encoder in {precision_words(options.precision)}",
        },
        failures=failures,
        protocol=protocol,
    )
    if record is not None:
        dataset = options.dataset_name or Path(options.manifest).stem
        record.evaluated_on(dataset, options.split, protocol, options.precision).write(directory)
    tell_left_out(cohort, directory)


def add_heatmap(subparsers: argparse._SubParsersAction) -> None:
    """The options of `ds-wsi heatmap`."""
    parser = add_command(subparsers, "heatmap", run_heatmap, "draw an exported model's attention over slides")
    _add_model_options(parser)
    parser.add_argument(*spellings("slide_ids"), help="comma-separated (default: all of the manifest)")
    _add_features_dir(parser)


def run_heatmap(options: argparse.Namespace) -> None:
    """`ds-wsi heatmap`."""
    from ds_wsi.engines.scope import Processes
    from ds_wsi.evaluation.protocol import EvaluationProtocol
    from ds_wsi.evaluation.results import draw_heatmaps

    options.manifest = _manifest_of(options)
    cohort, predictions, _ = _predictions(options, "all", EvaluationProtocol(), Processes(0, 1))
    for _, path in draw_heatmaps(Path(options.output_dir), cohort, predictions):
        print(path)
    tell_left_out(cohort, options.output_dir)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a run's folder, with config.json and model.safetensors")
    parser.add_argument("--dataset", choices=sorted(DATASETS), help="an external set as distributed, for --manifest")
    parser.add_argument(*spellings("data_dir"), help="the folder into which it was unpacked")
    parser.add_argument(
        *spellings("map_labels"), type=_pairs, help="its classes in the model's words: tumor=1,normal=0"
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
    parser.add_argument(*spellings("features_dir"), help="of a model of features: a file a slide")


def _pairs(text: str) -> dict[str, str]:
    pairs = [entry.split("=") for entry in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"must be pairs such as tumor=1,normal=0, got {text!r}")
    return {theirs.strip(): ours.strip() for theirs, ours in pairs}


def _manifest_of(options: argparse.Namespace) -> str:
    """The manifest that the options name: given, or written from a dataset in the model's classes."""
    from ds_wsi.bags.prepare import write_external
    from ds_wsi.models import ModelConfig

    if (options.manifest is None) == (options.dataset is None):
        raise ValueError("one of --manifest and --dataset must be given. HINT: --dataset NAME --data_dir FOLDER.")
    if options.dataset is None:
        extra = [name for name in (*reading_of(vars(options)), "data_dir", "map_labels") if vars(options).get(name)]
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
    options: argparse.Namespace, split: str, protocol: "EvaluationProtocol", processes: "Processes"
) -> tuple:
    """Predict the slides that the options choose with an exported model, on the tiles it was trained on. Collective.

    The processes share the slides by their tiles, and each has all predictions, in the cohort's order.
    """
    from ds_wsi.bags.feature_cohort import load_feature_cohort
    from ds_wsi.bags.sampler import deal_by_cost
    from ds_wsi.evaluation.predict import predict_slides
    from ds_wsi.models import load_model
    from ds_wsi.models.config import NORMS_SINCE, stored_version

    model, config = load_model(options.model)
    model.set_norms(evaluation=options.norm_evaluation)
    classes = classes_of(options) or config.classes
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

    def load(skipped: "tuple[SkippedSlide, ...] | None") -> "Cohort":
        if config.encoder is not None:
            tiling = tiling_of(options, read_section({"tiling": config.tiling}).tiling)
            return slides_of(options, tiling, classes, skipped)
        return load_feature_cohort(
            options.manifest,
            options.features_dir,
            in_dim=config.in_dim,
            check="shapes",
            classes=classes,
            workers=max(1, options.dataloader_num_workers),
            need_splits=False,
        )

    # The main process tiles the slides, and says which of them are left out.
    cohort = processes.main_first(load, lambda found: found.skipped)
    rows = _chosen_rows(options, cohort, split)
    shares = deal_by_cost([cohort.lengths[row] for row in rows], processes.world_size)
    own = [rows[index] for index in shares[processes.rank]]
    policy, failures = tile_reading_of(options, cohort)
    slides = cohort.manifest.slides
    stream = predict_slides(placed(model, options), slides, cohort.grids, own, policy, failures, protocol)
    predictions = [found for share in processes.gather(list(stream)) for found in share]
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


def _chosen_rows(options: argparse.Namespace, cohort: "Cohort", split: str) -> tuple[int, ...]:
    slides = cohort.manifest.slides
    wanted = getattr(options, "slide_ids", None)
    if wanted:
        ids = comma_separated(wanted)
        unknown = set(ids) - {slide.slide_id for slide in slides}
        if unknown:
            raise ValueError(f"--slide_ids must be of the manifest, got {', '.join(sorted(unknown))}")
        return tuple(row for row, slide in enumerate(slides) if slide.slide_id in ids)
    rows = tuple(row for row, slide in enumerate(slides) if split in ("all", slide.split))
    if not rows:
        raise ValueError(f"--split must name slides of the manifest, got {split!r}, which has none. HINT: --split all.")
    return rows
