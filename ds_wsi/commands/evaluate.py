"""`ds-wsi evaluate`: what an exported model says of a cohort."""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ds_wsi.commands.cohort import tell_left_out
from ds_wsi.commands.parser import add_command
from ds_wsi.commands.predicting import (
    add_features_dir,
    add_model_options,
    made_of,
    manifest_of,
    model_and_slides,
    sharing_of,
    slides_digest,
    tell_old_norms,
)
from ds_wsi.runtime.choices import precision_words
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.setting import tiles_or_all
from ds_wsi.runtime.streams import show
from ds_wsi.training.options import spellings

TILES = "number of random tiles of each slide, such as 256, or all (default: all)"

if TYPE_CHECKING:
    from ds_wsi.bags.cohort import Cohort
    from ds_wsi.evaluation.predict import SlidePrediction
    from ds_wsi.evaluation.record import RunRecord
    from ds_wsi.evaluation.shared import Sharing
    from ds_wsi.models import ModelConfig


def add_evaluate(subparsers: argparse._SubParsersAction) -> None:
    """The options of `ds-wsi evaluate`."""
    parser = add_command(subparsers, "evaluate", run_evaluate)
    add_model_options(parser)
    parser.add_argument("--split", default="test", help="split of the manifest, or `all` (default: test)")
    parser.add_argument(*spellings("eval_tiles"), type=tiles_or_all, help=TILES)
    parser.add_argument(*spellings("eval_runs"), type=int, default=1, help="draws of --eval_tiles (default: 1)")
    parser.add_argument(*spellings("eval_seed"), type=int, default=0, help="seed of the draws (default: 0)")
    parser.add_argument(*spellings("dataset_name"), help="name in tables of runs (default: the manifest's)")
    add_features_dir(parser)


def run_evaluate(options: argparse.Namespace) -> None:
    """`ds-wsi evaluate`, and launch/evaluate.py under any launcher; several processes share the slides."""
    from ds_wsi.bags.run_splits import read_splits, warn_of_overlap
    from ds_wsi.evaluation.folder import mark, require_no_run, require_same_evaluation, summary_of
    from ds_wsi.evaluation.protocol import EvaluationProtocol
    from ds_wsi.runtime.locks import in_turn, lock_path
    from ds_wsi.runtime.temporary import remove_left_behind
    from ds_wsi.training.run_folder import is_run_folder

    directory = Path(options.output_dir)
    require_no_run(directory, is_run_folder(directory))
    options.manifest = manifest_of(options)
    protocol = EvaluationProtocol(options.eval_tiles, options.eval_runs, options.eval_seed)
    known_by = made_of(options, protocol)
    require_same_evaluation(directory, known_by)
    record = _record_of(options.model)
    for folder in (directory, directory / "tiles", directory / "heatmaps"):
        remove_left_behind(folder)
    model, config, cohort = model_and_slides(options, options.split, "optional")
    known_by["slides"] = slides_digest(cohort, range(len(cohort.grids)))
    require_same_evaluation(directory, known_by)
    warn_of_overlap(cohort.manifest.slides, read_splits(Path(options.model)))
    sharing = sharing_of(options, model, cohort, protocol)
    mark(directory, known_by)
    predicted = sorted(sharing.predict(), key=lambda slide: slide.prediction.slide)
    sharing.failures.check()
    summary = _summary_of(options, cohort)
    digest = hashlib.sha256(json.dumps([known_by, summary]).encode()).hexdigest()[:16]
    with in_turn(lock_path(directory, "/summary")):  # no slide's name
        if sharing.shard.is_alone or summary_of(directory) != digest:
            _write(options, sharing, [slide.prediction for slide in predicted], summary, record, config)
            # When all is on disk: an error of a check must not cost the predictions.
            tell_old_norms(options, sharing.model, cohort, sharing.policy, sharing.failures)
            mark(directory, known_by, digest)
    if not sharing.shard.is_alone:
        here = sum(slide.made_here for slide in predicted)
        logger.info("shard %s: %d of %d slides predicted here", sharing.shard, here, len(predicted))


def _summary_of(options: argparse.Namespace, cohort: "Cohort") -> dict[str, str]:
    """What the report says of itself: the same of all processes."""
    from ds_wsi.bags.slide_policy import skipped_words
    from ds_wsi.evaluation.protocol import EvaluationProtocol
    from ds_wsi.runtime.environment import command_line

    protocol = EvaluationProtocol(options.eval_tiles, options.eval_runs, options.eval_seed)
    return {
        "command": command_line(),
        "model": options.model,
        "cohort": options.manifest,
        "split": options.split,
        **skipped_words(cohort.skipped),
        "evaluation": f"{protocol}, encoder in {precision_words(options.precision)}",
    }


def _write(
    options: argparse.Namespace,
    sharing: "Sharing",
    predictions: "Sequence[SlidePrediction]",
    summary: dict[str, str],
    record: "RunRecord | None",
    config: "ModelConfig",
) -> None:
    """Write what is told of all slides: the report, or without labels their predictions."""
    from ds_wsi.evaluation.results import REPORT, write_predictions, write_results
    from ds_wsi.evaluation.tasks.several import answers_of

    directory, cohort = sharing.folder, sharing.cohort
    answers = answers_of(config)
    if not any(slide.is_labelled for slide in cohort.manifest.slides):
        write_predictions(directory, cohort, predictions, sharing.known_by, answers)
        return
    dataset = options.dataset_name or Path(options.manifest).stem
    write_results(
        directory,
        cohort,
        predictions,
        title=f"{options.model} on {options.manifest}",
        summary=summary,
        failures=sharing.failures.rows(),
        protocol=sharing.protocol,
        split=options.split,
        dataset=dataset,
        tell=show,
        made_of=sharing.known_by,
        answers=answers,
    )
    if record is not None:
        record.evaluated_on(dataset, options.split, sharing.protocol, options.precision).write(directory)
    logger.info("written: %s, with metrics.json and predictions.csv beside it", directory / REPORT)
    tell_left_out(cohort, directory)


def _record_of(model: str) -> "RunRecord | None":
    from ds_wsi.evaluation.record import RunFolderError, RunRecord

    try:
        return RunRecord.read(Path(model))
    except RunFolderError as error:
        logger.warning("%s: %s. `ds-wsi report` will have no place for this evaluation.", model, error)
        return None
