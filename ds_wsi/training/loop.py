"""The loop: epochs of optimizer steps over bags, each epoch validated, recorded and checkpointed."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ds_wsi.bags.bag import Bag, BagPart, read_bags
from ds_wsi.bags.sampler import StepPlan, choose_tiles, plan_epoch, share_tiles
from ds_wsi.engines.accelerator.engine import average_buffers, gather_object
from ds_wsi.engines.accelerator.scope import closing_trackers, engine_scope
from ds_wsi.engines.sharded.zero import full_state_dict
from ds_wsi.evaluation.record import FILE_NAME as RECORD_FILE
from ds_wsi.models import merge_lora
from ds_wsi.models.loss import stack_loss
from ds_wsi.runtime.errors import naming
from ds_wsi.runtime.full_disk import naming_full_disk
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.memory import peak_memory_bytes
from ds_wsi.runtime.progress import PresentRate, Progress
from ds_wsi.runtime.ranks import watch_ranks
from ds_wsi.runtime.seeding import seed_step, step_seed
from ds_wsi.runtime.signals import Stopped, deferring, heeding_signals
from ds_wsi.runtime.words import counted
from ds_wsi.stacking.balance import OverCapError
from ds_wsi.stacking.randomness import bag_randomness
from ds_wsi.tile_parallel.collectives import Traffic, share_numbers
from ds_wsi.training.finite import (
    BagsAndLosses,
    count_skipped,
    mean_loss,
    skips_overflow,
    tell_not_finite,
    weights_are_finite,
    weights_seem_finite,
)
from ds_wsi.training.micro_step import MicroStep, MicroSteps, on_device, stack_of
from ds_wsi.training.optim import demon_beta, learning_rate_at, set_beta, warn_of_warmup
from ds_wsi.training.out_of_memory import with_retry
from ds_wsi.training.outcome import finish, finished_results, is_finished
from ds_wsi.training.resume import resume, save
from ds_wsi.training.run import Run, prepare_run
from ds_wsi.training.run_folder import alone_in, logging_to
from ds_wsi.training.screen import tell_start
from ds_wsi.training.settings import TrainSettings
from ds_wsi.training.step import bag_weight, blank_tile, idle_loss, run_micro_step
from ds_wsi.training.stopping import stop_reason
from ds_wsi.training.stops import any_rank_asked, kept_when_stopped, wants_to_stop, words_of_stop
from ds_wsi.training.validation import AtTheEnd, BesideTraining, validation_of
from ds_wsi.training.warmup import encoder_rests, forget_steps, set_rates


def train(settings: TrainSettings, deepspeed_config: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train, evaluate on the test split and write the run's folder.

    Collective: every process of the launcher calls it with the same settings. A process can train several times, one
    after the other; within `launched` the processes stay connected in between.

    Args:
        settings: of the run.
        deepspeed_config: the DeepSpeed JSON, or None for DDP or one process.

    Returns:
        On the main process the test metrics with their intervals, and the run's folder; elsewhere an empty dict.

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
    """In a frame of its own: when it is left nothing holds the run, and the scope can free its memory."""
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
        run.started = started
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


def _epoch_plan(run: Run, epoch: int) -> tuple[StepPlan, ...]:
    """The epoch's steps; where norms average over a step, its bags are encoded together, in one micro-step."""
    plan = _dealt(run, epoch)
    return tuple(step.as_one for step in plan) if run.config.norm_training == "step" else plan


def _dealt(run: Run, epoch: int) -> tuple[StepPlan, ...]:
    rows = run.cohort.rows("train")
    seed = run.settings.run.seed
    try:
        return plan_epoch(len(rows), run.step_layout, seed=seed, epoch=epoch, lengths=run.training_tiles)
    except OverCapError as error:
        slide = "" if error.bag is None else f" (slide {run.cohort.manifest.slides[rows[error.bag]].slide_id})"
        raise ValueError(
            f"{error}{slide}. HINT: raise --max_tiles_per_rank or --virtual_workers, share slides among ranks with "
            "--tile_parallel_size, or take fewer tiles with --tiles_per_slide."
        ) from error


def _parts_to_read(run: Run) -> Iterator[BagPart]:
    """Everything this rank trains on from here to the end, in order: what the workers read ahead."""
    rows, mesh = run.cohort.rows("train"), run.mesh
    first, skip = run.progress.epoch, run.progress.step_in_epoch
    for epoch in range(first, run.settings.optim.num_train_epochs):
        for step in _epoch_plan(run, epoch)[skip:]:
            for groups in step.micro_steps:
                yield from _parts(run, epoch, [rows[slide] for slide in groups[mesh.slide_rank]])
        skip = 0


def _parts(run: Run, epoch: int, slides: list[int]) -> list[BagPart]:
    """This rank's tiles of its group's slides of one micro-step: the same set of tiles for any number of ranks."""
    seed, wanted = run.settings.run.seed, run.settings.policies.reading.tiles_per_slide
    shares = run.settings.policies.tile_parallel.shares or (1.0,) * run.mesh.tile_size
    chosen = [choose_tiles(run.cohort.lengths[slide], wanted, (seed, epoch, slide)) for slide in slides]
    lengths = [
        run.cohort.lengths[slide] if rows is None else len(rows) for slide, rows in zip(slides, chosen, strict=True)
    ]
    stretches = share_tiles(lengths, shares)[run.mesh.tile_rank]
    return [
        BagPart(slide, start, stop, None if rows is None else rows[start:stop])
        for slide, rows, (start, stop) in zip(slides, chosen, stretches, strict=True)
    ]


def _train_epochs(run: Run) -> None:
    epochs = run.settings.optim.num_train_epochs
    cohort = run.cohort
    if run.settings.policies.stacking.max_tiles_per_rank is not None:
        for epoch in range(run.progress.epoch, epochs):
            _epoch_plan(run, epoch)  # a slide over the cap is refused now, not after hours
    read = read_bags(
        *(cohort.manifest.slides, cohort.grids, _parts_to_read(run), run.settings.policies.reading, run.failures),
        may_be_empty=run.mesh.tile_size > 1,
    )
    bags = MicroSteps(run, read)
    if run.accelerator.is_main_process:
        warn_of_warmup(run.settings.optim.warmup_steps, count_steps(run)[1])
    with validation_of(run) as validation:
        while run.progress.epoch < epochs and not _stops_early(run):
            began = time.perf_counter()
            with kept_when_stopped(run):
                entry = _train_epoch(run, bags, validation)
                run.epoch_seconds = time.perf_counter() - began
                validation.collect()
            average_buffers(run.accelerator, run.module)
            state = full_state_dict(run.module)  # once an epoch, to validate and to export: collective at ZeRO-3
            if run.average is not None:
                state |= run.average.weights()
            if run.settings.model.lora_rank:
                state = merge_lora(state, run.settings.model.lora_rank, run.settings.model.lora_alpha)
            _end_epoch(run, entry)
            with kept_when_stopped(run):
                validation.give(state)
            save(run)
        validation.collect()


def _stops_early(run: Run) -> bool:
    """Whether the history says so: the same on all ranks, and again where a stopped run is resumed."""
    settings = run.settings.run
    metric = f"eval_{settings.metric_for_best_model}"
    reason = stop_reason(run.progress.history, metric, settings.early_stopping_patience)
    if reason is not None:
        logger.info("early stopping after epoch %d: %s", run.progress.epoch, reason)
    return reason is not None


def _train_epoch(run: Run, bags: MicroSteps, validation: AtTheEnd | BesideTraining) -> dict[str, float]:
    progress, optim = run.progress, run.settings.optim
    plan = _epoch_plan(run, progress.epoch)
    _, total = count_steps(run)
    rate_at = partial(
        learning_rate_at,
        total_steps=total,
        peak=optim.learning_rate,
        schedule=optim.lr_scheduler_type,
        warmup_steps=optim.warmup_steps,
        steps_per_epoch=len(plan),
    )
    run.module.warming_up = encoder_rests(run.settings.model.freeze_encoder_epochs, progress.epoch)
    if progress.epoch == run.settings.model.freeze_encoder_epochs > 0 and progress.step_in_epoch == 0:
        forget_steps(run.optimizer)
    run.model.train()
    tiles_read, start, rate, skipped = 0, time.perf_counter(), 0.0, 0
    present = PresentRate()
    bar = Progress(
        f"epoch {progress.epoch + 1}/{optim.num_train_epochs}",
        "slide",
        sum(step.n_bags for step in plan),
        initial=sum(step.n_bags for step in plan[: progress.step_in_epoch]),
        shown=run.accelerator.is_main_process and not run.settings.run.disable_tqdm,
        leave=True,
    )
    with bar:
        for step, following in pairwise([*plan[progress.step_in_epoch :], None]):
            assert step is not None
            rate_now = rate_at(progress.global_step)
            if optim.demon:
                set_beta(run.optimizer, demon_beta(progress.global_step, total_steps=total, initial=optim.demon))
            loss, tiles = _train_step(run, step, following, bags, rate_now)
            validation.check()
            run.saver.check()
            tiles_read += tiles
            progress.global_step += 1
            progress.step_in_epoch += 1
            skipped = 0 if math.isfinite(loss) and not run.accelerator.optimizer_step_was_skipped else skipped + 1
            if skipped:
                count_skipped(run, skipped)
            if math.isfinite(loss):
                progress.loss_sum += loss
                progress.bags_seen += step.n_bags
            rate = tiles_read / (time.perf_counter() - start)
            peak = peak_memory_bytes(run.device)
            words = (
                f"mean loss {progress.loss_sum / max(1, progress.bags_seen):.3f}, {present.after(tiles):.0f} tiles/s, "
                f"{peak / 2**30:.2f} GiB"
            )
            bar.step(n=step.n_bags, words=words)
            run.accelerator.log(
                {
                    **({"train/loss": loss / step.n_bags} if math.isfinite(loss) else {}),
                    **({"train/skipped_steps": progress.skipped_steps} if skips_overflow(run) else {}),
                    "train/learning_rate": rate_now,
                    "train/tiles_per_second": rate,
                    "train/peak_memory_bytes": peak,
                    **(run.comm.metrics() if run.comm else {}),
                },
                step=progress.global_step,
            )
            save_steps = run.settings.run.save_steps
            by_step = save_steps and progress.global_step % save_steps == 0
            if run.stop_is_due:  # after an epoch's last step too: the epoch's end can take long
                raise Stopped(words_of_stop(run), together=True)
            if (by_step or run.save_is_due) and progress.step_in_epoch < len(plan):
                save(run)
    return {
        "epoch": progress.epoch + 1,
        "train_loss": mean_loss(run),
        "learning_rate": rate_at(progress.global_step - 1),  # of a run that was stopped after the epoch's last step too
        "tiles_per_second": rate,
        "peak_memory_bytes": float(peak_memory_bytes(run.device)),
        **(run.comm.metrics() if run.comm else {}),
    }


def _train_step(
    run: Run, step: StepPlan, following: StepPlan | None, bags: MicroSteps, learning_rate: float
) -> tuple[float, int]:
    """One optimizer step; returns the sum of its bags' losses and its tiles, over all ranks.

    While the device computes it, the first bags of the `following` one, of the same epoch, are made ready.
    """
    accelerator, mesh = run.accelerator, run.mesh
    set_rates(
        run.optimizer,
        learning_rate,
        run.settings.optim.weight_decay,
        resting=run.module.warming_up,
        encoder_factor=run.settings.encoder_factor,
    )
    seed_step(run.settings.run.seed, run.progress.global_step, accelerator.process_index)
    # Ranks that share a bag each compute its loss: there are as many means to take as groups.
    weight = bag_weight(step.n_bags, mesh.slide_size, len(step.micro_steps))
    loss_sum, tiles = torch.zeros((), device=run.device), 0
    seen: list[BagsAndLosses] = []
    for micro, groups in enumerate(step.micro_steps):
        if run.sharing.forward is not None:
            place = micro * mesh.slide_size + mesh.slide_rank
            run.sharing.forward.seed = step_seed(run.settings.run.seed, run.progress.global_step, place)
        bags_of_it = bags.take(len(groups[mesh.slide_rank]), run.progress.global_step)
        alone = len(step.micro_steps) == 1 and accelerator.num_processes == 1 and not run.has_own_engine
        done = _micro_step(run, bags_of_it, weight, again=partial(_start_again, run) if alone else None)
        loss_sum += done.loss
        tiles += done.n_tiles
        seen.append(done.seen)
    if run.average is not None:
        run.average.update(run.module)
    if following is not None:
        bags.make_ready(len(following.micro_steps[0][mesh.slide_rank]), run.progress.global_step + 1)
    waited = time.perf_counter() - run.saved
    due = 0 < 60 * run.settings.run.save_minutes <= waited
    told = [float(tiles), float(accelerator.is_main_process and due), float(wants_to_stop(run))]
    bad = ~weights_seem_finite(run.module, run.device)
    totals = accelerator.reduce(torch.cat([loss_sum[None], torch.tensor(told, device=run.device), bad[None]]), "sum")
    loss, n_tiles, *flags = totals.tolist()
    run.save_is_due, run.stop_is_due, bad_weights = (flag > 0 for flag in flags)
    bad_weights = bad_weights and not all(gather_object([weights_are_finite(run.module)]))
    left_out = not math.isfinite(loss) or accelerator.optimizer_step_was_skipped
    if bad_weights or (left_out and not skips_overflow(run)):
        tell_not_finite(run, run.progress.global_step, seen, loss_is_finite=math.isfinite(loss))
    return loss / mesh.tile_size, int(n_tiles)


class _Computed(NamedTuple):
    """Of a micro-step on this rank: the sum of its bags' losses, its tiles, and what it was of."""

    loss: torch.Tensor
    n_tiles: int
    seen: BagsAndLosses


def _micro_step(run: Run, step: MicroStep, weight: float, again: Callable[[], None] | None) -> _Computed:
    """Take a micro-step; `again` undoes a first try that ran out of memory."""
    computed: list[_Computed] = []

    def compute() -> torch.Tensor:
        computed[:] = [_micro_loss(run, step)]
        return computed[0].loss

    loss = run_micro_step(
        run.accelerator,
        run.model,
        run.optimizer,
        compute,
        weight,
        max_grad_norm=run.settings.optim.max_grad_norm,
        guard=lambda tried: with_retry(tried, run.module, run.module.encoder, run.device, again=again),
    )
    run.stacks.used()
    return computed[0]._replace(loss=loss)


def _start_again(run: Run) -> None:
    """Undo what a step's first try drew and summed."""
    run.optimizer.zero_grad()
    seed_step(run.settings.run.seed, run.progress.global_step, run.accelerator.process_index)


def _micro_loss(run: Run, step: MicroStep) -> _Computed:
    _require_tiles(run, step.bags)
    if not step.bags:
        idle = BagsAndLosses((), torch.ones(0, dtype=torch.bool))
        return _Computed(idle_loss(run.model, _blank(run)), 0, idle)
    labels = on_device([run.cohort.manifest.slides[bag.slide].class_index for bag in step.bags], run.device)
    stack = stack_of(run, step)
    with bag_randomness(step.keys, part=run.mesh.tile_rank), _naming_slides(run, step):
        output = run.model(stack, labels)
    chosen = run.settings.optim.class_weights
    weights = None if chosen is None else torch.tensor(chosen, device=run.device)[labels]
    slides = tuple(run.cohort.manifest.slides[bag.slide].slide_id for bag in step.bags)
    seen = BagsAndLosses(slides, output.logits.detach().isfinite().all(-1))
    return _Computed(stack_loss(output, labels, weights), sum(map(len, step.tiles)), seen)


@contextmanager
def _naming_slides(run: Run, step: MicroStep) -> Iterator[None]:
    """Say of which slides an error is; of a BatchNorm that saw one value a channel, in our words and not of tensors."""
    slides = [run.cohort.manifest.slides[bag.slide].slide_id for bag in step.bags]
    try:
        with naming(f"slides {', '.join(slides)}, step {run.progress.global_step}"):
            yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error) and "more than one value a channel" not in str(error):
            raise
        tiles = sum(map(len, step.tiles))
        raise ValueError(
            "the encoder's BatchNorm must see more than one value a channel in training, got "
            f"{counted(tiles, 'tile')} of {', '.join(slides)}. HINT: leave the slide out, or take --norm_training "
            "frozen, --bags_per_step 2, or a larger --tile_size_px."
        ) from error


def _blank(run: Run) -> torch.Tensor:
    """A bag of one blank instance, of what the model takes."""
    if run.cohort.in_dim is not None:
        return torch.zeros(1, run.cohort.in_dim, device=run.device)
    return blank_tile(run.settings.policies.tiling.tile_size_px, run.device)


def _require_tiles(run: Run, bags: list[Bag]) -> None:
    """Refuse, on all ranks that share it, a bag of which none could read a tile."""
    if run.mesh.tile_size == 1 or not bags:
        return
    counts = share_numbers([len(bag.tiles) for bag in bags], run.mesh.group, run.device, Traffic()).sum(0)
    for bag, count in zip(bags, counts.tolist(), strict=True):
        run.failures.require_tiles(bag.slide, count)


def _end_epoch(run: Run, entry: dict[str, float]) -> None:
    """Record the epoch, which is not validated yet, and go on to the next."""
    progress = run.progress
    progress.history.append(entry)
    progress.epoch += 1
    progress.step_in_epoch = 0
    progress.loss_sum, progress.bags_seen = 0.0, 0


class TimedSteps(NamedTuple):
    """Two micro-steps that were timed on this process.

    Attributes:
        read_s, compute_s: of each, seconds.
        tiles: of each; 0 where the process had no bag.
    """

    read_s: tuple[float, ...]
    compute_s: tuple[float, ...]
    tiles: tuple[int, ...]


def time_micro_steps(run: Run) -> TimedSteps:
    """Take two micro-steps of the first epoch and time them, reading (in this process) apart from computing.

    For a dry run: the weights, and the engine's count of micro-steps, are changed. Collective.
    """
    cohort, mesh = run.cohort, run.mesh
    steps = [(step, groups) for step in _epoch_plan(run, 0) for groups in step.micro_steps]
    # Of a small cohort some micro-steps leave a process without a bag; one alone is taken twice.
    steps = ([pair for pair in steps if all(pair[1])] or steps) * 2
    steps = steps[:2]
    rows = cohort.rows("train")
    parts = [part for _, groups in steps for part in _parts(run, 0, [rows[slide] for slide in groups[mesh.slide_rank]])]
    policy = replace(run.settings.policies.reading, workers=0)
    read_in_order = read_bags(
        *(cohort.manifest.slides, cohort.grids, parts, policy, run.failures), may_be_empty=mesh.tile_size > 1
    )
    bags = MicroSteps(run, read_in_order)
    run.model.train()
    read_s, compute_s, tiles = [], [], []
    for step, groups in steps:
        started = time.perf_counter()
        own = bags.take(len(groups[mesh.slide_rank]), run.progress.global_step)
        read = time.perf_counter()
        weight = bag_weight(step.n_bags, mesh.slide_size, len(step.micro_steps))
        done = _micro_step(run, own, weight, again=None)
        done.loss.item()  # waits for the device
        read_s.append(read - started)
        compute_s.append(time.perf_counter() - read)
        tiles.append(done.n_tiles)
    return TimedSteps(tuple(read_s), tuple(compute_s), tuple(tiles))


def count_steps(run: Run) -> tuple[int, int]:
    """Optimizer steps of an epoch, and of the run."""
    an_epoch = run.step_layout.steps_per_epoch(len(run.cohort.rows("train")))
    return an_epoch, an_epoch * run.settings.optim.num_train_epochs
