"""`ds-wsi evaluate`: what an exported model says of a cohort."""

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
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
    parser.add_argument(
        "--aggregate",
        nargs="+",
        type=str.split,
        metavar="patient HOW",
        help="tell patients in the place of slides: mean or max of the outputs of a patient's slides, such as `patient "
        "mean`; none tells slides (default: none)",
    )
    parser.add_argument(*spellings("dataset_name"), help="name in tables of runs (default: the manifest's)")
    add_features_dir(parser)


def run_evaluate(options: argparse.Namespace) -> None:
    """`ds-wsi evaluate`, and launch/evaluate.py under any launcher; several processes share the slides."""
    from ds_wsi.bags.run_splits import read_splits, warn_of_overlap
    from ds_wsi.bags.slide_entry import slides_of_rows
    from ds_wsi.evaluation.folder import mark, require_no_run, require_same_evaluation, summary_of
    from ds_wsi.evaluation.protocol import EvaluationProtocol
    from ds_wsi.runtime.locks import in_turn, lock_path
    from ds_wsi.runtime.temporary import remove_left_behind
    from ds_wsi.training.run_folder import is_run_folder

    directory = Path(options.output_dir)
    require_no_run(directory, is_run_folder(directory))
    how = _aggregation(options)
    options.manifest = manifest_of(options)
    protocol = EvaluationProtocol(options.eval_tiles, options.eval_runs, options.eval_seed)
    known_by = made_of(options, protocol) | {"aggregate": f"patient {how}"}
    require_same_evaluation(directory, known_by)
    record = _record_of(options.model)
    for folder in (directory, directory / "tiles", directory / "heatmaps"):
        remove_left_behind(folder)
    model, config, cohort = model_and_slides(options, options.split, "optional")
    _require_slides(how, config, cohort, options.model)
    known_by["slides"] = slides_digest(cohort, range(len(cohort.grids)))
    require_same_evaluation(directory, known_by)
    warn_of_overlap(slides_of_rows(cohort.manifest.slides), read_splits(Path(options.model)))
    sharing = sharing_of(options, model, cohort, protocol)
    mark(directory, known_by)
    predicted = sorted(sharing.predict(), key=lambda slide: slide.prediction.slide)
    sharing.failures.check()
    summary = _summary_of(options, cohort)
    digest = hashlib.sha256(json.dumps([known_by, summary]).encode()).hexdigest()[:16]
    with in_turn(lock_path(directory, "/summary")):  # no slide's name
        if sharing.shard.is_alone or summary_of(directory) != digest:
            _write(options, how, sharing, [slide.prediction for slide in predicted], summary, record, config)
            # When all is on disk: an error of a check must not cost the predictions.
            tell_old_norms(options, sharing.model, cohort, sharing.policy, sharing.failures)
            mark(directory, known_by, digest)
    if not sharing.shard.is_alone:
        here = sum(slide.made_here for slide in predicted)
        logger.info("shard %s: %d of %d bags predicted here", sharing.shard, here, len(predicted))


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
        **(
            {} if _aggregation(options) == "none" else {"patients": f"{_aggregation(options)} of their slides' outputs"}
        ),
        "evaluation": f"{protocol}, encoder in {precision_words(options.precision)}",
    }


def _aggregation(options: argparse.Namespace) -> str:
    """What is made of the outputs of a patient's slides: "none", "mean" or "max".

    Raises:
        ValueError: other words than the option's.
    """
    from ds_wsi.evaluation.late import HOW

    words = [word for part in options.aggregate or [["none"]] for word in part]
    level, how = ("patient", *words) if words == ["none"] else (words[0], " ".join(words[1:]))
    if level != "patient" or how not in HOW:
        raise ValueError(
            f"--aggregate must be patient and one of {', '.join(HOW)}, got {' '.join(words)!r}. HINT: --aggregate "
            "patient mean."
        )
    return how


def _require_slides(how: str, config: "ModelConfig", cohort: "Cohort", model: str) -> None:
    """Refuse what late pooling cannot be of, before anything is predicted."""
    from ds_wsi.bags.patients import require_patients

    if how == "none":
        return
    if config.bag != "slide":
        raise ValueError(
            f"--aggregate must be given for a model of slides, got {how} of one whose bags are of a {config.bag} "
            f"({model}). HINT: leave it out."
        )
    require_patients(cohort.manifest)


def _write(
    options: argparse.Namespace,
    how: str,
    sharing: "Sharing",
    predictions: "Sequence[SlidePrediction]",
    summary: dict[str, str],
    record: "RunRecord | None",
    config: "ModelConfig",
) -> None:
    """Write what is told of all slides: the report, or without labels their predictions."""
    from ds_wsi.evaluation.late import pooled_by_patient
    from ds_wsi.evaluation.results import REPORT, write_predictions, write_results
    from ds_wsi.evaluation.slide_maps import draw_heatmaps
    from ds_wsi.evaluation.tasks.several import answers_of

    directory, cohort = sharing.folder, sharing.cohort
    answers, made_maps = answers_of(config), None
    if how != "none":
        # Attention is each slide's own: its map is drawn of the slide's prediction.
        made_maps = draw_heatmaps(directory / "heatmaps", cohort, predictions, made_of=sharing.known_by)
        cohort, predictions = pooled_by_patient(cohort, predictions, how)
    if not any(slide.is_labelled for slide in cohort.manifest.slides):
        write_predictions(directory, cohort, predictions, sharing.known_by, answers, made_maps)
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
        heatmaps=made_maps,
    )
    if record is not None:
        record = record.evaluated_on(dataset, options.split, sharing.protocol, options.precision)
        settings = record.settings | ({} if how == "none" else {"aggregate": f"patient {how}"})
        replace(record, settings=settings).write(directory)
    logger.info("written: %s, with metrics.json and predictions.csv beside it", directory / REPORT)
    tell_left_out(cohort, directory)


def _record_of(model: str) -> "RunRecord | None":
    from ds_wsi.evaluation.record import RunFolderError, RunRecord

    try:
        return RunRecord.read(Path(model))
    except RunFolderError as error:
        logger.warning("%s: %s. `ds-wsi report` will have no place for this evaluation.", model, error)
        return None
