"""A Cox loss of a run's step: exact over the bags of all its micro-steps and processes.

Scores couple the bags, so that all of them must be known before the first backward. With one micro-step they are:
forward, gather, backward. With several, a first pass computes the scores alone, without a graph, with the draws of the
second, and leaves BatchNorm's running statistics as they were; the second pass goes forward again and backward. Every
process, with bags or without, calls the model as often as the others in each pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ds_wsi.bags.bag import Bag
from ds_wsi.models.output import SlideOutput
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.seeding import generator_states, set_generator_states
from ds_wsi.targets.cox import CoxStep, check_cox_steps, cox_step, cox_surrogate, few_events_chance
from ds_wsi.targets.sums import connected_zero
from ds_wsi.targets.survival_table import gather_table
from ds_wsi.targets.task import Task
from ds_wsi.training.context import RunContext
from ds_wsi.training.epoch_plan import PlannedStep, epoch_plan
from ds_wsi.training.micro_loss import Computed, blank_of, distilled_of, micro_output, nothing_seen, seen_of
from ds_wsi.training.micro_step import MicroStep, lay_bags
from ds_wsi.training.run import Run
from ds_wsi.training.step import idle_output

LossOf = Callable[[Run, MicroStep], Computed]
FEW_EVENTS = 0.05  # the share of steps without an event from which it is told


def cox_losses(
    run: Run, step: PlannedStep, micro_steps: Iterator[MicroStep], key: Callable[[int], None]
) -> Iterator[tuple[MicroStep, LossOf]]:
    """The step's micro-steps, each with what its backward starts from. Collective.

    Args:
        run: the run that takes the step.
        step: the step as it was planned.
        micro_steps: the step's bags, read as they are taken; the tiles of all are held where there are several.
        key: called with the number of each micro-step before its forward.
    """
    if len(step.parts) == 1:
        for micro in micro_steps:
            yield micro, whole_step
        return
    held, scores, states = _first_pass(run, micro_steps, key)
    bags = [bag for of_micro in held for bag in of_micro]
    own_scores = torch.cat(scores) if bags else torch.zeros(0, device=run.device)
    of_step, gradient = _gradient(run, own_scores, bags)
    parts = gradient.split([len(of_micro) for of_micro in held])
    for index, (of_micro, part) in enumerate(zip(held, parts, strict=True)):
        set_generator_states(states[index], run.device)
        micro = lay_bags(run, of_micro, step.number)
        yield micro, partial(_surrogate_of, part, of_step if index == 0 else None)


def whole_step(run: Run, step: MicroStep) -> Computed:
    """The surrogate of a step of one micro-step: forward, gather, and what backward starts from. Collective."""
    output = _output(run, step)
    of_step, gradient = _gradient(run, _own_scores(step, output), step.bags)
    return _computed(run, step, output, gradient, of_step)


def _surrogate_of(gradient: Tensor, of_step: CoxStep | None, run: Run, step: MicroStep) -> Computed:
    return _computed(run, step, _output(run, step), gradient, of_step)


def _first_pass(
    run: Run, micro_steps: Iterator[MicroStep], key: Callable[[int], None]
) -> tuple[list[list[Bag]], list[Tensor], list[list[Tensor]]]:
    """Bags, scores and the state of the generators before the forward, of each micro-step."""
    held: list[list[Bag]] = []
    scores: list[Tensor] = []
    states: list[list[Tensor]] = []
    with torch.no_grad(), _statistics_kept(run):
        for index, micro in enumerate(micro_steps):
            key(index)
            states.append(generator_states(run.device))
            scores.append(_own_scores(micro, _output(run, micro)))
            held.append(micro.bags)
            run.stacks.used()
    return held, scores, states


@contextmanager
def _statistics_kept(run: Run) -> Iterator[None]:
    """Put the buffers, running statistics among them, back at the end."""
    buffers = list(run.module.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, was in zip(buffers, before, strict=True):
            buffer.copy_(was)


def _output(run: Run, step: MicroStep) -> SlideOutput:
    return micro_output(run, step) if step.bags else idle_output(run.model, blank_of(run))


def _own_scores(step: MicroStep, output: SlideOutput) -> Tensor:
    """Scores of this process's bags, float64 [b]; a blank has none."""
    return output.logits.detach().double().reshape(-1)[: len(step.bags)]


def _gradient(run: Run, scores: Tensor, bags: list[Bag]) -> tuple[CoxStep, Tensor]:
    """The whole step's loss, and the gradient of this process's scores. Collective over the groups that have bags."""
    assert isinstance(run.task, Task)
    slides = run.cohort.manifest.slides
    rows = [bag.slide for bag in bags]
    numbers = stratum_numbers(run)
    strata = [numbers[slides[row].stratum] for row in rows]
    own_table = run.task.table(scores, run.task.targets([slides[row].target for row in rows]), rows, strata)
    # Where ranks share bags each has all the scores of its group: gathered over the groups, a bag stands once.
    group = None if run.mesh.mesh is None else run.mesh.mesh.get_group("slide")
    gathered = gather_table(own_table, group)
    if len(gathered.table) < 2:  # of a timed micro-step alone: steps of one bag are refused before
        return CoxStep(0.0, torch.zeros(len(gathered.table), dtype=torch.float64), 0), torch.zeros(len(bags)).double()
    of_step = cox_step(gathered.table, run.task.ties)
    return of_step, of_step.gradient[gathered.rows]


def _computed(run: Run, step: MicroStep, output: SlideOutput, gradient: Tensor, of_step: CoxStep | None) -> Computed:
    """The surrogate of a micro-step; of the step's loss each group tells its share, in one of its micro-steps."""
    share = 0.0 if of_step is None else of_step.loss * of_step.n_events / run.mesh.slide_size
    told = torch.tensor(share, device=run.device)
    if not step.bags:
        return Computed(connected_zero(output.logits), 0, nothing_seen(), told)
    loss = cox_surrogate(output.logits, gradient)
    n_tiles = sum(map(len, step.tiles))
    return Computed(loss, n_tiles, seen_of(run, step, output), told, distilled_of(run, step, output))


def stratum_numbers(run: RunContext) -> dict[str | None, int]:
    """The strata's names -> numbers, the same on every process."""
    names = sorted({slide.stratum for slide in run.cohort.manifest.slides if slide.stratum is not None})
    return {None: 0, **{name: number for number, name in enumerate(names)}}


def require_cox_steps(run: RunContext) -> None:
    """Refuse a plan with a step of one bag; tell how many steps will have no event, from which nothing is learned.

    Raises:
        ValueError: names the step.
    """
    if run.task is None or not run.task.couples:
        return
    plan = epoch_plan(run, 0)
    check_cox_steps([step.n_bags for step in plan])
    rows = run.cohort.rows("train")
    events = sum(run.cohort.manifest.slides[row].target[1] == 1 for row in rows)
    bags = run.step_layout.bags_per_step
    none, one = few_events_chance(events / len(rows), bags)
    logger.info(
        "a Cox step of %d bags is of these alone: with %d events in %d slides about %.1f%% of steps have none and "
        "%.1f%% one",
        *(min(bags, len(rows)), events, len(rows), 100 * none, 100 * one),
    )
    if none > FEW_EVENTS:
        logger.warning("steps without an event teach nothing. HINT: a larger --bags_per_step; 64 is usual.")
