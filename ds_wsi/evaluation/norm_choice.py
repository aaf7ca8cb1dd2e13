"""How the norms of trained weights are evaluated: each candidate measured on the same slides, the best one taken.

A network whose norms averaged over few bags in training is another one with running statistics: it can be at chance
where its training loss is near zero. So the choice is measured, and so is the gap between what was trained and what is
exported: the loss of the same weights on a few training slides, once with the population of training, once as exported.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ds_wsi.bags.bag import Bag, BagPart, FailureLog, read_bags, read_chunks, tile_side
from ds_wsi.bags.joined import Grids, scales_of
from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.bags.policy import ReadPolicy
from ds_wsi.evaluation.populations import HeldTiles, TileEncoder
from ds_wsi.evaluation.predict import NormVariant, SlidePrediction, predict_variants, prediction_metrics
from ds_wsi.evaluation.task_metrics.table import better_number
from ds_wsi.evaluation.tasks.several import Answers
from ds_wsi.models.slide_model import SlideModel
from ds_wsi.norms.policy import CANDIDATES
from ds_wsi.norms.population import OneValueError
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.signals import Stopped, asked
from ds_wsi.stacking.stacked_bags import stack_bags

# A gap is told where the exported loss exceeds the trained one by both: near zero a ratio says nothing.
GAP_RATIO, GAP_NATS = 0.10, 0.05
GAP_REMEDY = (
    "HINT: --norm_evaluation auto exports the best of what can be; --norm_training step with --bags_per_step 8, or "
    "frozen with an encoder that has weights, trains what is exported."
)


@dataclass(frozen=True)
class NormPlan:
    """What is measured.

    Args:
        training: the population that was trained, of a `NormPolicy`.
        candidates: evaluations to choose from, in the order in which ties are decided; one is taken unmeasured.
        metric: what they are compared by, before the lower loss.
        rows: slides on which they are measured.
        split: the split that these slides are of.
        recalibration: parts of the training slides over which statistics are taken anew.
        gap: parts of some training slides, on which the gap is measured; empty where there can be none.
        bags_per_population: how many of those training averages over at once.
        resting_epochs: so many first epochs train the aggregator alone, over an encoder in evaluation mode.
        answers: how outputs are answers to another task than classification; None: to that.
        probes: other slides that the exported model will have to take, where some evaluation may not be able to.
    """

    training: str = "frozen"
    candidates: tuple[str, ...] = ("running",)
    metric: str = "auc"
    rows: tuple[int, ...] = ()
    split: str = "validation"
    recalibration: tuple[BagPart, ...] = ()
    gap: tuple[BagPart, ...] = ()
    bags_per_population: int = 1
    resting_epochs: int = 0
    probes: tuple[int, ...] = ()
    answers: Answers | None = None

    def of_epoch(self, epoch: int) -> "NormPlan":
        """The plan after this epoch, from 1: while the encoder rests its norms take running statistics."""
        return replace(self, training="frozen") if epoch <= self.resting_epochs else self


class NormGap(NamedTuple):
    """Mean losses of the same weights on the same training slides."""

    trained: float
    exported: float

    @property
    def is_wide(self) -> bool:
        """Whether it is beyond the bound; a loss that is not finite is."""
        if not math.isfinite(self.exported):
            return True
        return self.exported > self.trained * (1 + GAP_RATIO) and self.exported > self.trained + GAP_NATS


@dataclass(frozen=True)
class NormChoice:
    """What was measured, and what follows.

    Args:
        evaluation: the candidate that is best.
        metrics: each candidate's on the slides, keys prefixed with `eval_`; empty where there was no slide. Without
            those that cannot take all slides.
        split: the split that these slides are of.
        statistics: running statistics of the encoder that the exported weights get; None: their own.
        gap: None where there can be none.
    """

    evaluation: str
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    split: str = "validation"
    statistics: dict[str, Tensor] | None = None
    gap: NormGap | None = None

    def entry(self) -> dict[str, Any]:
        """History values: `norm_evaluation`, `norm_<candidate>_<metric>`, `norm_trained_loss`, `norm_exported_loss`."""
        values: dict[str, Any] = {"norm_evaluation": self.evaluation, "norm_split": self.split}
        for name, metrics in self.metrics.items():
            values |= {f"norm_{name}_{key.removeprefix('eval_')}": value for key, value in metrics.items()}
        if self.gap is not None:
            values |= {"norm_trained_loss": self.gap.trained, "norm_exported_loss": self.gap.exported}
        return values


@dataclass(frozen=True)
class Ranks:
    """The processes that measure together: alone by default.

    Args:
        share: takes the items' costs, and gives the indices of those that this process takes.
        gather: what all processes' lists hold, in one list, on all of them.
        group: a process group of all of them, or None.
    """

    share: Callable[[Sequence[int]], Sequence[int]] = lambda costs: range(len(costs))
    gather: Callable[[list[Any]], list[Any]] = list
    group: Any = None

    def leave_if_asked(self) -> None:
        """End the measurement where any of the processes was asked to end, which has left out work until here.

        Raises:
            Stopped: on all of them. Collective: a gather.
        """
        reasons = self.gather([asked()])
        if any(reasons):
            raise Stopped(asked() or "another rank", together=True)


def choose_norms(
    model: SlideModel,
    slides: Sequence[SlideEntry],
    grids: Grids,
    policy: ReadPolicy,
    failures: FailureLog,
    plan: NormPlan,
    ranks: Ranks | None = None,
) -> NormChoice:
    """Measure the candidates of a plan and choose; the model is as it was afterwards. Collective over the ranks.

    A candidate whose norms have one value per channel, in a slide of one tile, is left out with a warning.

    Args:
        model: whole, on the device to compute on.
        slides, grids: the cohort's, row by row.
        policy: how tiles are read.
        failures: where unreadable tiles are recorded.
        plan: what is measured.
        ranks: the processes that share the work.

    Raises:
        OneValueError: on all ranks, where no candidate is left; names the slide.
        Stopped: a process was asked to end, inside `deferring`; see there.
    """
    ranks = ranks or Ranks()
    training, model = model.training, model.eval()
    statistics, refused = None, {}
    if "recalibrated" in plan.candidates:
        try:
            statistics = _recalibrated(model, slides, grids, policy, failures, plan.recalibration, ranks)
        except OneValueError as error:  # of the population of all ranks, on all of them
            refused["recalibrated"] = error
        ranks.leave_if_asked()
    possible = [name for name in plan.candidates if name not in refused]
    variants = [NormVariant(name, statistics if name == "recalibrated" else None) for name in possible]
    metrics: dict[str, dict[str, float]] = {}
    if plan.rows:
        rows = list(dict.fromkeys((*plan.rows, *plan.probes)))
        rows_here = [rows[index] for index in ranks.share([len(grids[row]) for row in rows])]
        gathered = ranks.gather(list(predict_variants(model, slides, grids, rows_here, policy, failures, variants)))
        ranks.leave_if_asked()
        for variant, answers in zip(variants, zip(*gathered, strict=True), strict=True):
            predictions = [one for one in answers if isinstance(one, SlidePrediction)]
            errors = [one for one in answers if isinstance(one, OneValueError)]
            if errors:
                refused[variant.name] = errors[0]
            else:
                measured = [one for one in predictions if one.slide in plan.rows]
                metrics[variant.name] = prediction_metrics(measured, slides, plan.answers)
    best = best_candidate(metrics, plan.metric, _left(plan.candidates, refused))
    kept = statistics if best == "recalibrated" else None
    gap = None
    if plan.gap:
        # Each process on its own, of the same few slides: no norm waits for another process.
        gap = norm_gap(model, slides, grids, policy, failures, plan, NormVariant(best, kept))
        ranks.leave_if_asked()
    model.train(training)
    return NormChoice(best, metrics, plan.split, kept, gap)


def _left(candidates: Sequence[str], refused: Mapping[str, OneValueError]) -> list[str]:
    """The candidates that can take all slides; the others are told."""
    left = [name for name in candidates if name not in refused]
    if not left:
        raise next(iter(refused.values()))
    for name, error in refused.items():
        logger.warning("norm_evaluation %s is left out, the others are measured: %s", name, error)
    return left


def best_candidate(metrics: dict[str, dict[str, float]], metric: str, candidates: Sequence[str]) -> str:
    """The candidate with the best metric, then the lowest loss; the first where none was measured."""

    def rank(name: str) -> tuple[float, float]:
        of_candidate = metrics.get(name, {})
        loss = of_candidate.get("eval_loss", math.inf)
        better = better_number(metric, of_candidate.get(f"eval_{metric}"))
        return better, -loss if loss == loss else -math.inf

    return max(candidates, key=rank)  # the first of equals


def _recalibrated(
    model: SlideModel,
    slides: Sequence[SlideEntry],
    grids: Grids,
    policy: ReadPolicy,
    failures: FailureLog,
    parts: Sequence[BagPart],
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Running statistics over the tiles of these parts, all ranks' shares as one population."""
    parts_here = [parts[index] for index in ranks.share([_length(part) for part in parts])]
    tiles = HeldTiles(slides, grids, policy)
    for chunk in read_chunks(slides, grids, parts_here, policy):
        failures.add(chunk)
        tiles.add(chunk.tiles)
        if asked():
            break
    if not parts_here:  # the other processes wait for this one at each norm
        size = tile_side(grids)
        tiles.add(torch.empty(0, 3, size, size, dtype=torch.uint8))
    evaluation = model.norm_evaluation
    model.set_norms(evaluation="running")
    try:
        return TileEncoder(model).recalibrated(tiles, parts_here, ranks.group)
    finally:
        model.set_norms(evaluation=evaluation)


@torch.no_grad()
def norm_gap(
    model: SlideModel,
    slides: Sequence[SlideEntry],
    grids: Grids,
    policy: ReadPolicy,
    failures: FailureLog,
    plan: NormPlan,
    exported: NormVariant,
) -> NormGap | None:
    """The mean loss on the plan's parts with the population of training, and as exported; without dropout in both.

    Populations are as large as in training: what is left over of the parts makes none. Parts in which a norm has one
    value per channel are left out; None where there is no other.
    """
    evaluation = model.norm_evaluation
    model.set_norms(evaluation="running")
    encode = TileEncoder(model)
    sums, n_bags = torch.zeros(2, dtype=torch.float64), 0
    answered: list[tuple[SlideEntry, list[Tensor]]] = []
    parts = plan.gap[: len(plan.gap) - len(plan.gap) % plan.bags_per_population or None]
    try:
        waiting: list[Bag] = []
        bags = read_bags(slides, grids, parts, policy, failures)
        for number, bag in enumerate(bags, 1):
            if asked():
                break
            waiting.append(bag)
            if len(waiting) < plan.bags_per_population and number < len(parts):
                continue
            population, waiting = waiting, []
            tiles = [one.tiles for one in population]
            try:
                of_training = plan.training != "frozen"
                trained = encode.together(tiles) if of_training else _features(encode, tiles, NormVariant("running"))
                shown = _features(encode, tiles, exported)
            except OneValueError:
                continue
            n_bags += len(population)
            for (slide, _, kept), *features in zip(population, trained, shown, strict=True):
                scales = scales_of(grids[slide], kept).to(encode.device)
                stacks = [stack_bags([part.to(encode.device)]) for part in features]
                logits = [model.aggregate(stack, scales=scales).logits.double() for stack in stacks]
                if plan.answers is not None:
                    answered.append((slides[slide], [each.cpu() for each in logits]))
                    continue
                label = torch.tensor([slides[slide].class_index], device=encode.device)
                for index, each in enumerate(logits):
                    sums[index] += cross_entropy(each, label).item()
    finally:
        model.set_norms(evaluation=evaluation)
    if plan.answers is not None:
        return _task_gap(plan.answers, answered)
    return NormGap(*(sums / n_bags).tolist()) if n_bags else None


def _task_gap(answers: Answers, answered: Sequence[tuple[SlideEntry, list[Tensor]]]) -> NormGap | None:
    """The gap of another task: of the slides' losses together, because they need not be a sum over slides."""
    with_target = [(slide, outputs) for slide, outputs in answered if slide.is_labelled]
    slides = [slide for slide, _ in with_target]
    losses = [
        answers.mean_loss(torch.cat([pair[index] for _, pair in with_target]), slides)
        for index in range(2 if with_target else 0)
    ]
    return NormGap(*losses) if losses and not math.isnan(losses[0]) else None


def _features(encode: TileEncoder, tiles: Sequence[Tensor], variant: NormVariant) -> list[Tensor]:
    with encode.statistics(variant.statistics):
        if variant.name == "bag":
            return [encode.together([one])[0] for one in tiles]
        return [encode(one) for one in tiles]


def _length(part: BagPart) -> int:
    return part.stop - part.start if part.rows is None else len(part.rows)


def candidates_of(evaluation: str, training: str, *, has_norms: bool) -> tuple[str, ...]:
    """What is measured: all evaluations under "auto", but where running statistics are what was trained."""
    if not has_norms:
        return ("running",)
    if evaluation != "auto":
        return (evaluation,)
    return ("running",) if training == "frozen" else CANDIDATES
