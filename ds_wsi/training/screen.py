"""What a run says on the screen: what it is at its start, an epoch's line, the time that is left."""

from typing import Any

from ds_wsi.engines.accelerator.engine import describe
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.progress import duration
from ds_wsi.runtime.words import counted
from ds_wsi.training.context import RunContext
from ds_wsi.training.run import Run
from ds_wsi.training.task import task_words
from ds_wsi.training.words import model_words, tiles_words

MOST_WAITING = 0.1  # share of an epoch
WORTH_A_WORD_S = 60.0  # an epoch that is over in less is waited for by nobody


def tell_start(run: RunContext, steps_per_epoch: int, steps: int) -> None:
    """Log the run in a block of lines: where, with what, on which model, how many steps."""
    optim = run.settings.optim
    slides = run.cohort.rows("train")
    bags = -(-len(slides) // max(1, steps_per_epoch))
    parameters = list(run.module.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters)
    lines = {
        "folder": f"{run.output_dir}, with train.log",
        "engine": describe(run.accelerator, optim.mixed_precision),
        **({"task": task_words(run.task)} if run.task else {"classes": ", ".join(run.cohort.manifest.classes)}),
        "tiles": tiles_words(run),
        "model": f"{model_words(run)}; {_count(trained)} of {_count(total)} parameters trained",
        "steps": f"{steps_per_epoch} per epoch, {steps} in {optim.num_train_epochs}; "
        f"{counted(bags, 'slide')} per step; rate {optim.learning_rate:g} after {optim.warmup_of(steps)} steps, "
        f"{optim.lr_scheduler_type}",
        "checkpoints": _checkpoint_words(run),
    }
    width = max(map(len, lines))
    logger.info("the run\n%s", "\n".join(f"  {name:<{width}}  {words}" for name, words in lines.items()))


def _checkpoint_words(run: RunContext) -> str:
    steps, minutes = run.settings.run.save_steps, run.settings.run.save_minutes
    every = [f"every {counted(steps, 'step')}"] if steps else []
    every += [f"every {minutes:g} minutes"] if minutes else []
    return ", ".join([*every, "at each epoch's end"])


def _count(number: int) -> str:
    """A number of parameters; under ZeRO-3 and FSDP2 of this process's part."""
    return f"{number / 1e6:.1f} M" if number >= 1e5 else str(number)


def epoch_line(run: Run, entry: dict[str, Any], *, chosen: bool) -> str:
    """An epoch's line: its time, its losses, the metric that chooses the epoch, and the time that is left.

    Args:
        run: the run that trains.
        entry: the epoch's in the history, which holds everything else.
        chosen: whether its weights are the best by a validation split so far.
    """
    metric = run.best_metric
    epochs = run.epochs
    words = [f"epoch {int(entry['epoch'])}/{epochs}"]
    seconds = run.clock.epoch_seconds
    if seconds is not None:
        words.append(f"{duration(seconds)}, data wait {run.clock.share_waited:.0%}")
    words.append(f"loss {entry['train_loss']:.4g}")
    if "eval_loss" in entry:
        words.append(f"validation {entry['eval_loss']:.4g}")
    if metric in entry:
        words.append(f"{metric.removeprefix('eval_')} {entry[metric]:.3f}" + (" (best so far)" if chosen else ""))
    left = epochs - int(entry["epoch"])
    if seconds is not None and left > 0:
        words.append(f"left: about {duration(left * seconds)}")
    return "   ".join(words)


def warn_of_waiting(run: Run) -> None:
    """Say once per start what makes reading faster, where the epoch that has ended waited for tiles."""
    seconds = run.clock.epoch_seconds or 0.0
    if seconds < WORTH_A_WORD_S or run.clock.share_waited <= MOST_WAITING or run.clock.told_of_waiting:
        return
    run.clock.told_of_waiting = True
    reading = run.settings.policies.reading
    remedies = [f"--dataloader_num_workers {2 * max(reading.workers, 1)}, where there are cores for them"]
    if run.cohort.in_dim is None and not reading.tile_store:
        remedies.append("tiles that are decoded once: ds-wsi tile --store DIR, then --tile_store DIR")
    logger.warning(
        "training must not wait for tiles for more than %.0f%% of its time, got %.0f%% of epoch %d's %s on rank %d. "
        "HINT: %s.",
        *(100 * MOST_WAITING, 100 * run.clock.share_waited, run.progress.epoch + 1, duration(seconds)),
        *(run.accelerator.process_index, "; or ".join(remedies)),
    )
