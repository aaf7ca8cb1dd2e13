"""The loop: epochs of optimizer steps over bags, each epoch validated, recorded and checkpointed."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ds_wsi.engines.accelerator.engine import average_buffers
from ds_wsi.engines.accelerator.scope import closing_trackers, engine_scope
from ds_wsi.engines.sharded.zero import full_state_dict
from ds_wsi.evaluation.record import FILE_NAME as RECORD_FILE
from ds_wsi.models import merge_lora
from ds_wsi.runtime.full_disk import naming_full_disk
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.memory import peak_memory_bytes
from ds_wsi.runtime.progress import PresentRate, Progress
from ds_wsi.runtime.ranks import watch_ranks
from ds_wsi.runtime.signals import Stopped, deferring, heeding_signals
from ds_wsi.training.context import RunContext
from ds_wsi.training.epoch_plan import count_steps, epoch_plan, planned_steps
from ds_wsi.training.finite import (
    mean_loss,
    skips_overflow,
    tell_skipped_steps,
)
from ds_wsi.training.one_step import train_step
from ds_wsi.training.optim import demon_beta, learning_rate_at, set_beta, warn_of_warmup
from ds_wsi.training.outcome import finish, finished_results, is_finished
from ds_wsi.training.prepare import prepare_run
from ds_wsi.training.resume import resume, save
from ds_wsi.training.run import Run
from ds_wsi.training.run_folder import alone_in, logging_to
from ds_wsi.training.screen import tell_start, warn_of_waiting
from ds_wsi.training.settings import TrainSettings
from ds_wsi.training.step_log import PresentPeak, StepLog
from ds_wsi.training.step_reader import StepReader, read_parts
from ds_wsi.training.stopping import stop_reason
from ds_wsi.training.stops import any_rank_asked, kept_when_stopped, words_of_stop
from ds_wsi.training.validation import AtTheEnd, BesideTraining, validation_of
from ds_wsi.training.warmup import encoder_rests, forget_steps


def train(settings: TrainSettings, deepspeed_config: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train, evaluate on the test split and write the run's folder.

    Collective: every process of the launcher calls it with the same settings. A process can train several times, one
    after the other; within `launched` the processes stay connected in between.

    Args:
        settings: the run's.
        deepspeed_config: the DeepSpeed JSON, or None for DDP or one process.

    Returns:
        The test metrics with their intervals, and the run's folder, on the main process; elsewhere an empty dict.

    Raises:
        ManifestError: lists everything that is wrong with the cohort, before anything is trained.
        RankFailureError: another process failed or died; names it.
        Stopped: the run was asked to end by a signal, or by `max_minutes`; what was done is in a checkpoint. The
            signals are heeded where the main thread calls.
        ValueError: settings that contradict each other, or a checkpoint that is torn.
    """
    with heeding_signals(), engine_scope():
        return _train(settings, deepspeed_config)


def _train(settings: TrainSettings, deepspeed_config: dict[str, Any] | None) -> dict[str, Any]:
    """What `train` does, in its own frame: when it is left nothing holds the run, and the scope can free its memory."""
    started = time.perf_counter()
    with ExitStack() as scope:

        def on_folder(path: Path) -> None:
            scope.enter_context(alone_in(path))
            scope.enter_context(logging_to(path))

        run = prepare_run(
            *(settings, deepspeed_config),
            on_folder=on_folder,
            on_connected=lambda: scope.enter_context(watch_ranks()),
        )
        scope.enter_context(naming_full_disk(run.output_dir))  # of TensorBoard's thread, and of the engine
        scope.enter_context(closing_trackers(run.accelerator))
        scope.enter_context(run.saver)
        run.clock.started = started
        resume(run)
        if is_finished(run):
            results = finished_results(run, started)
        else:
            if run.accelerator.is_main_process:
                # Of an earlier end in this folder: from here until it ends anew, the run is unfinished.
                (run.output_dir / RECORD_FILE).unlink(missing_ok=True)
            tell_start(run, *count_steps(run))
            with deferring():
                try:
                    _train_epochs(run)
                    if any_rank_asked(run):  # its end can be begun anew from the last checkpoint, which is whole
                        raise Stopped(words_of_stop(run), together=True)
                except Stopped:
                    # Launchers end all ranks when one has ended: none does before the last checkpoint is there.
                    run.saver.close()
                    run.accelerator.wait_for_everyone()
                    raise
                run.saver.close()  # before the end is told
            results = finish(run, started)
    run.accelerator.free_memory()
    return results


def _train_epochs(run: Run) -> None:
    if run.settings.policies.stacking.max_tiles_per_rank is not None:
        for epoch in range(run.progress.epoch, run.epochs):
            epoch_plan(run, epoch)  # a slide over the cap is refused now, not after hours
    steps = StepReader(run, planned_steps(run, run.progress), read_parts(run, run.reading))
    if run.accelerator.is_main_process:
        steps_of_run = count_steps(run)[1]
        warn_of_warmup(run.settings.optim.warmup_of(steps_of_run), steps_of_run)
    with validation_of(run) as validation:
        while run.progress.epoch < run.epochs and not _stops_early(run):
            began, waited = time.perf_counter(), steps.waited
            with kept_when_stopped(run):
                entry = _train_epoch(run, steps, validation)
                if run.teacher is not None:
                    logger.info("epoch %d: features %.4g from the teacher's", entry["epoch"], entry["distill_loss"])
                run.clock.epoch_seconds = time.perf_counter() - began
                run.clock.epoch_waited = steps.waited - waited
                validation.collect()
            warn_of_waiting(run)
            average_buffers(run.accelerator, run.module)
            state = full_state_dict(run.module)  # once per epoch, to validate and to export: collective at ZeRO-3
            if run.average is not None:
                state |= run.average.weights()
            if run.settings.model.lora_rank:
                state = merge_lora(state, run.settings.model.lora_rank, run.settings.model.lora_alpha)
            run.progress.end_epoch(entry)
            with kept_when_stopped(run):
                validation.give(state)
            save(run)
        validation.collect()


def _stops_early(run: Run) -> bool:
    """Whether the history says so: the same on all ranks, and again where a stopped run is resumed."""
    reason = stop_reason(run.progress.history, run.best_metric, run.settings.run.early_stopping_patience)
    if reason is not None:
        logger.info("early stopping after epoch %d: %s", run.progress.epoch, reason)
    return reason is not None


def _train_epoch(run: Run, steps: StepReader, validation: AtTheEnd | BesideTraining) -> dict[str, float]:
    progress, optim = run.progress, run.settings.optim
    an_epoch, total = count_steps(run)
    rate_at = _rates(run, an_epoch)
    run.module.warming_up = encoder_rests(run.settings.model.freeze_encoder_epochs, progress.epoch)
    if progress.epoch == run.settings.model.freeze_encoder_epochs > 0 and progress.step_in_epoch == 0:
        forget_steps(run.optimizer)
    run.model.train()
    tiles_read, start, rate, skipped, present = 0, time.perf_counter(), 0.0, 0, PresentRate()
    waited, peak = steps.waited, PresentPeak(run)
    with _epoch_bar(run) as bar, StepLog(run) as log:
        for step, micro_steps in steps.of_epoch(progress.epoch):
            rate_now = rate_at(step.number)
            if optim.demon:
                set_beta(run.optimizer, demon_beta(step.number, total_steps=total, initial=optim.demon))
            done = train_step(run, step, micro_steps, rate_now, steps.make_ready)
            validation.check()
            run.saver.check()
            tiles_read += done.n_tiles
            was_skipped = not math.isfinite(done.loss) or run.accelerator.optimizer_step_was_skipped
            progress.end_step(done.loss, done.units, skipped=was_skipped)
            progress.end_distilled(done.distilled, step.plan.n_bags)
            skipped = skipped + 1 if was_skipped else 0
            if was_skipped:
                tell_skipped_steps(run, skipped)
            seconds = time.perf_counter() - start
            rate = tiles_read / seconds
            words = (
                f"mean loss {progress.loss_sum / max(1, progress.bags_seen):.3f}{_teacher_words(run)}, "
                f"{present.after(done.n_tiles):.0f} tiles/s, "
                f"data wait {(steps.waited - waited) / seconds:.0%}, {peak.n_bytes / 2**30:.2f} GiB"
            )
            bar.step(n=step.plan.n_bags, words=words)
            distilled = {} if run.teacher is None else {"train/distill_loss": done.distilled / step.plan.n_bags}
            values = _step_values(run, done.loss / max(1, done.units), rate_now, rate, peak)
            log.add(progress.global_step, values | distilled)
            save_steps = run.settings.run.save_steps
            by_step = save_steps and progress.global_step % save_steps == 0
            if done.stop_is_due:  # after an epoch's last step too: the epoch's end can take long
                raise Stopped(words_of_stop(run), together=True)
            if (by_step or done.save_is_due) and progress.step_in_epoch < an_epoch:
                log.write()  # a run that goes on from there logs the steps after it
                save(run)
    return {
        "epoch": progress.epoch + 1,
        "train_loss": mean_loss(run),
        **({} if run.teacher is None else {"distill_loss": progress.distill_sum / max(1, progress.distill_bags)}),
        "learning_rate": rate_at(progress.global_step - 1),  # of a run that was stopped after the epoch's last step too
        "tiles_per_second": rate,
        "peak_memory_bytes": float(peak_memory_bytes(run.device)),
        **(run.comm.metrics() if run.comm else {}),
    }


def _step_values(
    run: Run, loss: float, learning_rate: float, tiles_per_second: float, peak: PresentPeak
) -> dict[str, float]:
    """What the trackers are told of the step that has ended."""
    return {
        **({"train/loss": loss} if math.isfinite(loss) else {}),
        **({"train/skipped_steps": run.progress.skipped_steps} if skips_overflow(run) else {}),
        "train/learning_rate": learning_rate,
        "train/tiles_per_second": tiles_per_second,
        "train/peak_memory_bytes": peak.n_bytes,
        **(run.comm.metrics() if run.comm else {}),
    }


def _teacher_words(run: Run) -> str:
    if run.teacher is None:
        return ""
    return f", from the teacher {run.progress.distill_sum / max(1, run.progress.distill_bags):.3g}"


def _rates(run: RunContext, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate of a step, by its number in the run."""
    optim, total_steps = run.settings.optim, count_steps(run)[1]
    return partial(
        learning_rate_at,
        total_steps=total_steps,
        peak=optim.learning_rate,
        schedule=optim.lr_scheduler_type,
        warmup_steps=optim.warmup_of(total_steps),
        steps_per_epoch=steps_per_epoch,
    )


def _epoch_bar(run: Run) -> Progress:
    progress, slides = run.progress, len(run.cohort.rows("train"))
    return Progress(
        f"epoch {progress.epoch + 1}/{run.epochs}",
        "slide",
        slides,
        initial=min(slides, progress.step_in_epoch * run.step_layout.bags_per_step),
        shown=run.accelerator.is_main_process and not run.settings.run.disable_tqdm,
        leave=True,
    )
