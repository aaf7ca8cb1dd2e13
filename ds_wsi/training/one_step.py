"""One optimizer step of a run: its micro-steps, its totals over all ranks, and what was not finite."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from ds_wsi.bags.bag import Bag, read_bags
from ds_wsi.bags.sampler import StepPlan
from ds_wsi.engines.accelerator.engine import gather_object
from ds_wsi.models.loss import stack_loss
from ds_wsi.runtime.errors import naming
from ds_wsi.runtime.seeding import seed_step, step_seed
from ds_wsi.runtime.words import counted
from ds_wsi.stacking.randomness import bag_randomness
from ds_wsi.tile_parallel.collectives import Traffic, share_numbers
from ds_wsi.training.epoch_plan import epoch_plan, parts_of
from ds_wsi.training.finite import (
    BagsAndLosses,
    skips_overflow,
    tell_not_finite,
    weights_are_finite,
    weights_seem_finite,
)
from ds_wsi.training.micro_step import MicroStep, MicroSteps, on_device, stack_of
from ds_wsi.training.out_of_memory import naming_no_memory, with_retry
from ds_wsi.training.run import Run
from ds_wsi.training.step import bag_weight, blank_tile, idle_loss, run_micro_step
from ds_wsi.training.stops import wants_to_stop
from ds_wsi.training.warmup import set_rates


def train_step(
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

    # What is not the guard's is the optimizer's: Adam makes its moments in the first step.
    with naming_no_memory("the optimizer's step", run.module.encoder, run.device):
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
    steps = [(step, groups) for step in epoch_plan(run, 0) for groups in step.micro_steps]
    # Of a small cohort some micro-steps leave a process without a bag; one alone is taken twice.
    steps = ([pair for pair in steps if all(pair[1])] or steps) * 2
    steps = steps[:2]
    rows = cohort.rows("train")
    parts = [
        part for _, groups in steps for part in parts_of(run, 0, [rows[slide] for slide in groups[mesh.slide_rank]])
    ]
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
