"""When an epoch is validated: at its end, or beside the next one; and what follows from it."""

import time
from collections.abc import Callable
from typing import Any

import torch

from ds_wsi.engines.accelerator.engine import broadcast_object_list
from ds_wsi.evaluation.norm_choice import GAP_REMEDY, NormChoice
from ds_wsi.evaluation.validator import ValidationResult, ValidationWork, Validator
from ds_wsi.models import save_weights
from ds_wsi.models.weights_file import read_weights
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.signals import Stopped, asked
from ds_wsi.training.checkpoint import PENDING_WEIGHTS
from ds_wsi.training.norm_plan import measures_norms, norm_plan
from ds_wsi.training.outcome import (
    best_entry,
    draw_history,
    export,
    export_file,
    keep_history,
    norm_words,
    share_failures,
    validate,
)
from ds_wsi.training.run import Run
from ds_wsi.training.screen import epoch_line


class AtTheEnd:
    """Validates each epoch's weights at its end, all ranks together, before the next begins."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __enter__(self) -> "AtTheEnd":
        """Make up for a validation that the resumed run, which validated beside training, had not finished."""
        run = self.run
        if run.progress.pending:
            state = read_weights(run.output_dir / PENDING_WEIGHTS)
            self._validate(state)
            run.progress.pending = False
            run.accelerator.wait_for_everyone()  # all have read it
            if run.accelerator.is_main_process:
                (run.output_dir / PENDING_WEIGHTS).unlink()
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is under way."""

    def check(self) -> None:
        """Nothing is under way."""

    def collect(self) -> None:
        """Nothing is under way."""

    def give(self, state: dict[str, torch.Tensor]) -> None:
        """Validate the whole weights of the epoch that ended. Collective.

        Raises:
            Stopped: on all ranks; the weights lie where the next checkpoint, and a resumed run, finds them.
        """
        try:
            self._validate(state)
        except Stopped:
            if self.run.accelerator.is_main_process:
                save_weights(self.run.output_dir / PENDING_WEIGHTS, state)
            self.run.progress.pending = True
            raise

    def _validate(self, state: dict[str, torch.Tensor]) -> None:
        choice = validate(self.run, state)
        record(self.run, choice, lambda: export(self.run, state, choice))


class BesideTraining:
    """Validates each epoch's weights in a process of the main rank's, while all ranks train the next epoch.

    At most one validation is under way. Its result is taken in at the end of the next epoch, or of the run, on all
    ranks together and never when it happens to arrive: what a run does is no matter of timing. The weights wait in a
    file, of which each checkpoint in between keeps a link: what is exported is that file, never newer weights.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.validator: Validator | None = None

    def __enter__(self) -> "BesideTraining":
        """Start the main rank's process, and the validation that a resumed run had not finished."""
        run, cohort = self.run, self.run.cohort
        if run.accelerator.is_main_process:
            device = run.settings.run.validation_device or str(run.device)
            policy = run.reading
            work = ValidationWork(
                *(run.config, cohort.manifest.slides, cohort.grids, norm_plan(run), policy, device),
                precision=run.settings.run.eval_precision,
            )
            self.validator = Validator(work)
            if run.progress.pending:
                self.validator.submit(run.progress.epoch, run.output_dir / PENDING_WEIGHTS)
        return self

    def __exit__(self, *exception: object) -> None:
        """End the process, finished or not; what is under way is in the checkpoints."""
        if self.validator is not None:
            self.validator.close()
            (self.run.output_dir / PENDING_WEIGHTS).unlink(missing_ok=True)

    def check(self) -> None:
        """Raise the failure or death of the process as soon as it is known, on the main rank."""
        if self.validator is not None and not asked():  # launchers end its process too, with all of a job's
            self.validator.check()

    def collect(self) -> None:
        """Wait for the validation that is under way, if any, and take in its result. Collective.

        Raises:
            Stopped: on all ranks; the validation is under way still.
        """
        run = self.run
        if not run.progress.pending:
            return
        answer: list[Any] = [None]
        if self.validator is not None:
            started = time.perf_counter()
            answer = [self.validator.wait(unless=lambda: bool(asked()))]
            waited = time.perf_counter() - started
            logger.info("waited %.1f s for the validation of epoch %d", waited, run.progress.history[-1]["epoch"])
            run.accelerator.log({"eval/seconds_waited": waited}, step=run.progress.global_step)
        answered = broadcast_object_list(answer)[0]
        if answered is None:
            raise Stopped(asked() or "another rank", together=True)
        result = ValidationResult(*answered)
        for failure in result.failures.items():
            run.failures.reasons.setdefault(*failure)
        share_failures(run)
        run.progress.pending = False
        record(run, result.choice, lambda: export_file(run, run.output_dir / PENDING_WEIGHTS, result.choice))

    def give(self, state: dict[str, torch.Tensor]) -> None:
        """Start to validate the whole weights of the epoch that ended."""
        run = self.run
        if self.validator is not None:
            save_weights(run.output_dir / PENDING_WEIGHTS, state)
            self.validator.submit(run.progress.epoch, run.output_dir / PENDING_WEIGHTS)
        run.progress.pending = True
        line = epoch_line(run, run.progress.history[-1], chosen=False)
        logger.info("%s   validated from now on", line)


def validation_of(run: Run) -> AtTheEnd | BesideTraining:
    """The validation that the settings ask for; without a validation split there is nothing to do beside."""
    beside = run.settings.run.validate_beside and run.cohort.rows("validation")
    return BesideTraining(run) if beside else AtTheEnd(run)


def record(run: Run, choice: NormChoice, export_weights: Callable[[], None]) -> None:
    """Fill the last finished epoch's metrics into its entry, and export its weights where they are the best so far.

    Args:
        run: the run; between no and all steps of its next epoch are done.
        choice: what was measured of the norms; without a validation split there is no metric of the epoch.
        export_weights: called on the main rank.
    """
    progress = run.progress
    entry = progress.history[-1]
    if norm_plan(run).split == "validation":
        entry.update(choice.metrics.get(choice.evaluation, {}))
    if measures_norms(run):
        entry.update(choice.entry())
    best = best_entry(progress.history, run.best_metric) is entry
    if best:
        progress.best_epoch = int(entry["epoch"])
        if run.accelerator.is_main_process:
            export_weights()
    validated = norm_plan(run).split == "validation"
    logger.info("%s", epoch_line(run, entry, chosen=best and validated))
    _tell_norms(run, choice, entry)
    if run.accelerator.is_main_process:
        keep_history(run)
        draw_history(run)
    evaluated = {f"eval/{key[5:]}": value for key, value in entry.items() if key.startswith("eval_")}
    run.accelerator.log({**evaluated, "epoch": entry["epoch"]}, step=progress.global_step - progress.step_in_epoch)


def _tell_norms(run: Run, choice: NormChoice, entry: dict[str, Any]) -> None:
    """Print what was measured of each candidate, and warn once of a gap between what was trained and is exported."""
    words = norm_words(run.config.norm_training, entry)
    if not words:
        return
    logger.info("epoch %d: %s", entry["epoch"], words)
    if choice.gap is None or not choice.gap.is_wide:
        return
    earlier = [past for past in run.progress.history if past is not entry and past.get("norm_gap_told")]
    entry["norm_gap_told"] = 1.0
    if not earlier:
        logger.warning(
            "the exported model is not the model that was trained: on some training slides its loss is %.4g, with the "
            "norms as they were trained %.4g. %s",
            *(choice.gap.exported, choice.gap.trained, GAP_REMEDY),
        )
