"""Validation while training, and what a finished run leaves behind."""

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.bags.sampler import deal_by_cost
from ds_wsi.bags.slide_policy import skipped_words, tell_skipped
from ds_wsi.engines.accelerator.engine import CommHandle, broadcast_object_list, gather_object
from ds_wsi.evaluation.bootstrap import metrics_from_json
from ds_wsi.evaluation.curves import draw_curves
from ds_wsi.evaluation.norm_choice import GAP_NATS, GAP_RATIO, NormChoice, NormGap, Ranks, choose_norms
from ds_wsi.evaluation.predict import ALL_TILES, SlidePrediction, predict_slides
from ds_wsi.evaluation.protocol import EvaluationProtocol
from ds_wsi.evaluation.record import RunFolderError, RunRecord, read_metrics
from ds_wsi.evaluation.results import REPORT, write_results
from ds_wsi.evaluation.task_metrics.table import better_number
from ds_wsi.evaluation.tasks.answers import run_outputs
from ds_wsi.evaluation.tasks.fitted import KEY
from ds_wsi.evaluation.tasks.several import Answers, answers_of, fit_answers, splits_of
from ds_wsi.models import ModelConfig, SlideModel, build_model, load_model, save_model
from ds_wsi.models.weights_file import read_weights
from ds_wsi.norms.policy import CANDIDATES, POPULATIONS
from ds_wsi.runtime.choices import precision_words
from ds_wsi.runtime.environment import command_line, environment
from ds_wsi.runtime.files import json_number, sync_directory, write_json
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.progress import Progress
from ds_wsi.training.changed import changed_settings
from ds_wsi.training.checkpoint import read_state
from ds_wsi.training.context import RunContext
from ds_wsi.training.norm_plan import norm_plan
from ds_wsi.training.record import dataset_name, run_record
from ds_wsi.training.run import Run
from ds_wsi.training.same_run import TEST_FILES, fingerprint
from ds_wsi.training.stopping import stop_reason
from ds_wsi.training.task import task_words
from ds_wsi.training.words import model_words, tiles_words


def _plain_copy(run: RunContext, state: dict[str, torch.Tensor]) -> SlideModel:
    """A whole float32 model of these weights outside the engine: evaluates the same at any ZeRO stage."""
    model = build_model(run.config, allow_code=run.config.own_code.values())
    model.load_state_dict(state)
    model.evaluation_precision = run.settings.run.eval_precision
    return model.to(run.device).eval()


def _predict(
    run: Run, model: SlideModel, split: str, protocol: EvaluationProtocol = ALL_TILES
) -> list[SlidePrediction]:
    """Predictions of a split, in its order, on every rank: each rank predicts a share, balanced by tiles."""
    rows = run.cohort.rows(split)
    shares = deal_by_cost([run.cohort.lengths[row] for row in rows], run.accelerator.num_processes)
    share = [rows[index] for index in shares[run.accelerator.process_index]]
    cohort = run.cohort
    stream = predict_slides(model, cohort.manifest.slides, cohort.grids, share, run.reading, run.failures, protocol)
    # Of this process's share: the others have as many tiles each.
    what = f"{split}, {len(rows)} slides" if len(share) < len(rows) else split
    shown = run.accelerator.is_main_process and not run.settings.run.disable_tqdm
    predictions = list(Progress(what, "slide", len(share), shown=shown).over(stream))
    if run.accelerator.num_processes > 1:
        predictions = gather_object(predictions)
    share_failures(run)
    return sorted(predictions, key=lambda prediction: prediction.slide)


def share_failures(run: Run) -> None:
    """Take in the tiles that other ranks could not read, and stop above the threshold. Collective."""
    if run.accelerator.num_processes > 1:
        for failure in gather_object(list(run.failures.reasons.items())):
            run.failures.reasons.setdefault(*failure)
    run.failures.check()


def validate(run: Run, state: dict[str, torch.Tensor]) -> NormChoice:
    """How the norms of whole weights are best evaluated, measured on the validation split or without one in training.

    Collective: the slides are shared by tiles.
    """
    cohort, accelerator = run.cohort, run.accelerator
    shared = accelerator.num_processes > 1
    ranks = Ranks(
        share=lambda costs: deal_by_cost(costs, accelerator.num_processes)[accelerator.process_index],
        gather=gather_object if shared else list,
        group=torch.distributed.group.WORLD if shared else None,
    )
    choice = choose_norms(
        *(_plain_copy(run, state), cohort.manifest.slides, cohort.grids, run.reading, run.failures),
        norm_plan(run).of_epoch(int(run.progress.history[-1]["epoch"])),
        ranks,
    )
    share_failures(run)
    return choice


def best_entry(history: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The first epoch with the best metric, ties broken by the lower eval_loss; the last where none has it."""
    scored = [entry for entry in history if metric in entry]
    if not scored:
        return history[-1]
    return max(scored, key=lambda entry: (better_number(metric, entry[metric]), -entry["eval_loss"]))


def export(run: RunContext, state: dict[str, torch.Tensor], choice: NormChoice) -> None:
    """Write config.json and model.safetensors, each atomically, with the norms as they were chosen."""
    statistics = {f"encoder.{name}": value for name, value in (choice.statistics or {}).items()}
    save_model(run.output_dir, replace(run.config, norm_evaluation=choice.evaluation), state | statistics)


def export_file(run: RunContext, weights: Path, choice: NormChoice) -> None:
    """Do as `export` does, with a file of weights in the run's folder, which is moved."""
    if choice.statistics is not None:
        export(run, read_weights(weights), choice)
        weights.unlink()
        return
    replace(run.config, norm_evaluation=choice.evaluation).write(run.output_dir / "config.json")
    os.replace(weights, run.output_dir / "model.safetensors")
    sync_directory(run.output_dir)


def finish(run: Run, started: float) -> dict[str, Any]:
    """Evaluate the exported weights on the test split and write the results. Collective.

    Args:
        run: the run, trained.
        started: `time.perf_counter()` at its start.

    Returns:
        The test metrics with their intervals, and the run's folder, on the main process; elsewhere an empty dict.
    """
    run.accelerator.wait_for_everyone()
    model, config = load_model(run.output_dir, allow_code=run.config.own_code.values())
    model.evaluation_precision = run.settings.run.eval_precision
    protocol = run.settings.run.evaluation
    answers = _fit_answers(run, model.to(run.device), config)
    predictions = _predict(run, model, "test", protocol)
    if not run.accelerator.is_main_process:
        return {}
    progress, settings = run.progress, run.settings
    seconds = time.perf_counter() - started
    keep_history(run)
    write_json(run.output_dir / "failed_tiles.json", run.failures.rows())
    intervals = write_results(
        run.output_dir,
        run.cohort,
        predictions,
        title=model_words(run),
        summary=_summary(run, seconds),
        failures=run.failures.rows(),
        history=progress.history,
        best_epoch=progress.best_epoch,
        metric=run.best_metric.removeprefix("eval_"),
        seed=settings.run.seed,
        protocol=protocol,
        norms=norms_measured(run.config.norm_training, _exported_entry(run)),
        n_heatmaps=settings.run.heatmaps,
        dataset=dataset_name(settings.data),
        changed=changed_settings(settings),
        shown=not settings.run.disable_tqdm,
        answers=answers,
    )
    run_record(run).write(run.output_dir)  # last: a folder without it is unfinished
    seconds = time.perf_counter() - started
    logger.info("finished in %.0f s: %s", seconds, run.output_dir / REPORT)
    tell_skipped(run.cohort.skipped, run.cohort.n_slides + len(run.cohort.skipped))
    return {"output_dir": str(run.output_dir), "metrics": intervals, "seconds": seconds}


def _fit_answers(run: Run, model: SlideModel, config: ModelConfig) -> Answers | None:
    """Fit what a task's answers need on the run's own splits, and keep it in config.json; None of classification.

    Collective: every rank predicts a share of the split.
    """
    answers = answers_of(config)
    outputs: dict[str, torch.Tensor] = {}
    slides: dict[str, list[SlideEntry]] = {}
    for split in () if answers is None else splits_of(answers):
        if run.cohort.rows(split):
            predictions = _predict(run, model, split)
            (outputs[split],) = run_outputs([prediction.run_logits[:1] for prediction in predictions])
            slides[split] = [run.cohort.manifest.slides[prediction.slide] for prediction in predictions]
    if answers is None or not outputs:
        return answers
    answers = fit_answers(answers, outputs, slides)
    if run.accelerator.is_main_process:
        replace(config, task={**config.task, KEY: answers.fitted_json()}).write(run.output_dir / "config.json")
    return answers


def is_finished(run: Run) -> bool:
    """Whether the checkpoint that was loaded is a finished run's, with whole results for these settings. Collective.

    The same: what `require_same` compares, how the model is tested, and the test slides.
    """
    answer = [_has_results(run) if run.accelerator.is_main_process else None]
    return bool(broadcast_object_list(answer)[0])


def _has_results(run: Run) -> bool:
    progress, settings = run.progress, run.settings.run
    if run.checkpoint is None or progress.pending:
        return False
    stopped = stop_reason(progress.history, run.best_metric, settings.early_stopping_patience) is not None
    if progress.epoch < run.epochs and not stopped:
        return False
    if read_state(run.checkpoint)["fingerprint"].get(TEST_FILES) != fingerprint(run)[TEST_FILES]:
        return False
    try:
        same = RunRecord.read(run.output_dir) == run_record(run)
    except RunFolderError:
        return False
    return same and all((run.output_dir / name).is_file() for name in ("model.safetensors", REPORT))


def finished_results(run: Run, started: float) -> dict[str, Any]:
    """What `finish` returned when the run ended, read from its folder; see there."""
    if not run.accelerator.is_main_process:
        return {}
    report = run.output_dir / REPORT
    logger.info("finished already: report %s, nothing is trained or tested again", report)
    metrics = read_metrics(run.output_dir)
    seconds = time.perf_counter() - started
    return {"output_dir": str(run.output_dir), "metrics": metrics_from_json(metrics), "seconds": seconds}


def keep_history(run: Run) -> None:
    """Write history.json as it is so far; a value that is no number is null."""
    history = run.progress.history
    write_json(
        run.output_dir / "history.json",
        [
            {name: json_number(value) if isinstance(value, float) else value for name, value in entry.items()}
            for entry in history
        ],
    )


def draw_history(run: Run) -> None:
    """Draw curves.png of the epochs so far."""
    progress, metric = run.progress, run.best_metric
    history = [dict(entry) for entry in progress.history]
    draw_curves(history, run.output_dir / "curves.png", best_epoch=progress.best_epoch, metric=metric)


def _exported_entry(run: Run) -> Mapping[str, Any]:
    """The entry of the epoch whose weights were exported."""
    return next((entry for entry in run.progress.history if entry["epoch"] == run.progress.best_epoch), {})


def norms_measured(training: str, entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """What metrics.json has of norms: what they averaged over, each candidate's measurements, and the gap; or None."""
    if "norm_evaluation" not in entry:
        return None
    candidates: dict[str, dict[str, float]] = {}
    for key, value in entry.items():
        kind, _, name = key.removeprefix("norm_").partition("_")
        if key.startswith("norm_") and kind in CANDIDATES:
            candidates.setdefault(kind, {})[name] = value
    measured: dict[str, Any] = {
        "training": training,
        "evaluation": entry["norm_evaluation"],
        "measured_on": entry["norm_split"] if candidates else None,
        "candidates": candidates,
    }
    if "norm_trained_loss" in entry:
        gap = NormGap(entry["norm_trained_loss"], entry["norm_exported_loss"])
        measured["gap"] = {"trained_loss": gap.trained, "exported_loss": gap.exported, "is_wide": gap.is_wide}
    return measured


def norm_words(training: str, entry: Mapping[str, Any]) -> str:
    """A line of the report; empty where the encoder has no BatchNorm that was trained."""
    measured = norms_measured(training, entry)
    if measured is None:
        return ""
    words = [f"BatchNorm averages over {POPULATIONS[training]} in training, exported with {measured['evaluation']}"]
    shown = [
        f"{name} loss {values['loss']:.4g}" + (f", auc {values['auc']:.3f}" if "auc" in values else "")
        for name, values in measured["candidates"].items()
    ]
    if shown:
        words.append(f"on the {measured['measured_on']} slides: {'; '.join(shown)}")
    if "gap" in measured:
        gap = measured["gap"]
        wide = f": WIDER than {GAP_RATIO:.0%} and {GAP_NATS}" if gap["is_wide"] else ""
        words.append(
            f"loss on some training slides {gap['trained_loss']:.4g} as trained, {gap['exported_loss']:.4g} as exported"
            + wide
        )
    return ". ".join(words)


def _comm_words(comm: CommHandle) -> str:
    words = [f"{name.partition('/')[2].replace('_', ' ')} {value:.4g}" for name, value in comm.metrics().items()]
    return ", ".join([f"{comm.name} hook under {comm.where}", *words])


def _time_words(run: Run, seconds: float) -> str:
    if run.clock.starts == 1:
        return f"{seconds:.0f} s"
    return f"{run.clock.seconds_before + seconds:.0f} s in {run.clock.starts} starts, {seconds:.0f} s in the last"


def _summary(run: Run, seconds: float) -> dict[str, str]:
    cohort, optim = run.cohort, run.settings.optim
    return {
        "command": command_line(),
        "cohort": str(cohort.manifest.source),
        **({"task": task_words(run.task)} if run.task else {"classes": ", ".join(cohort.manifest.classes)}),
        "tiles": tiles_words(run),
        **skipped_words(cohort.skipped),
        "model": model_words(run),
        "optimisation": f"{optim.optim}, learning rate {optim.learning_rate:g} ({optim.lr_scheduler_type}), "
        f"{optim.num_train_epochs} epochs, "
        f"{optim.per_device_train_batch_size} x {optim.gradient_accumulation_steps} slides per process and step",
        "evaluation": f"{run.settings.run.evaluation}, encoder in {precision_words(run.settings.run.eval_precision)}",
        **({"norms": words} if (words := norm_words(run.config.norm_training, _exported_entry(run))) else {}),
        "processes": str(run.accelerator.num_processes),
        **({"communication": _comm_words(run.comm)} if run.comm else {}),
        "best epoch": str(run.progress.best_epoch),
        **(
            {"stopped early": f"after epoch {stopped}"}
            if (stopped := run.progress.epoch) < optim.num_train_epochs
            else {}
        ),
        "seed": str(run.seed),
        "time": _time_words(run, seconds),
        **({"data wait": f"{run.clock.share_waited:.0%} of the last epoch"} if run.clock.epoch_seconds else {}),
        **{key: str(value) for key, value in environment().items()},
    }
