"""Answers to several targets: each by itself, of the slides that have it, and the mean of their first metrics."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.bags.target_parts import with_target
from ds_wsi.evaluation.bootstrap import Measure
from ds_wsi.evaluation.metrics import FloatArray, IntArray
from ds_wsi.evaluation.task_metrics.measured import Measured
from ds_wsi.evaluation.task_metrics.table import MEAN, default_metric, mean_of_defaults, of_target
from ds_wsi.evaluation.tasks.answers import TaskAnswers, told_of_epoch
from ds_wsi.evaluation.tasks.fitted import KEY, Fitted, fitted_on, splits_fitted_on
from ds_wsi.models.config import ModelConfig
from ds_wsi.targets.several import Part, SeveralTargets


class OwnPart(NamedTuple):
    """One of several targets as a model's only one.

    Attributes:
        name: the target's.
        answers: how its outputs are answers.
        slides: all slides, with this target alone.
        outputs: each run's, the target's columns of them.
    """

    name: str
    answers: TaskAnswers
    slides: list[SlideEntry]
    outputs: list[Tensor]

    @property
    def labelled_rows(self) -> list[int]:
        """The slides that have the target."""
        return [row for row, slide in enumerate(self.slides) if slide.is_labelled]


@dataclass(frozen=True)
class SeveralAnswers:
    """How a model's outputs are answers to several targets; as `TaskAnswers` of one.

    Attributes:
        task: the targets.
        fitted: target -> what was fitted for it on the run's own splits.
    """

    task: SeveralTargets
    fitted: Mapping[str, Fitted] = field(default_factory=dict)

    def own(self, part: Part) -> TaskAnswers:
        """The answers to one target."""
        return TaskAnswers(part.task, self.fitted.get(part.name, Fitted()))

    def parts(self, slides: Sequence[SlideEntry], outputs: Sequence[Tensor]) -> Iterator[OwnPart]:
        """Each target by itself.

        Args:
            slides: N.
            outputs: outputs of each run, [N, ...] on the host.
        """
        for part in self.task.parts:
            own_slides = [with_target(slide, part.task.kind, part.values) for slide in slides]
            yield OwnPart(part.name, self.own(part), own_slides, [run[:, part.outputs] for run in outputs])

    def measures(self, outputs: Sequence[Tensor], slides: Sequence[SlideEntry]) -> list[Measure]:
        """One measure per run of the protocol, for the bootstrap: targets share the patients that are drawn."""
        each: list[list[PartMeasure]] = [[] for _ in outputs]
        for part in self.parts(slides, outputs):
            rows = part.labelled_rows
            if not rows:
                continue
            of_runs = part.answers.measures([run[rows] for run in part.outputs], [part.slides[row] for row in rows])
            first = default_metric(part.answers.task.kind).name
            for parts, measure in zip(each, of_runs, strict=True):
                parts.append(PartMeasure(part.name, first, np.array(rows), measure))
        return [partial(measured, parts) for parts in each]

    def metrics(self, outputs: Tensor, slides: Sequence[SlideEntry]) -> dict[str, Measured]:
        """The metrics of each target's slides, named TARGET.METRIC, and `MEAN`."""
        values: dict[str, Measured] = {}
        first: dict[str, Measured] = {}
        for part in self.parts(slides, [outputs]):
            rows = part.labelled_rows
            if not rows:
                continue
            metrics = part.answers.metrics(part.outputs[0][rows], [part.slides[row] for row in rows])
            values |= {of_target(part.name, name): measured for name, measured in metrics.items()}
            first[part.name] = metrics[default_metric(part.answers.task.kind).name]
        return {MEAN: mean_of_defaults(first), **values}

    def epoch_metrics(self, outputs: Tensor, slides: Sequence[SlideEntry]) -> dict[str, float]:
        """The targets' loss and metrics, and their mean; see `TaskAnswers.epoch_metrics`."""
        return told_of_epoch(self, outputs, slides)

    def mean_loss(self, outputs: Tensor, slides: Sequence[SlideEntry]) -> float:
        """The weighted sum of the targets' losses, each per its unit."""
        return self.task.mean_loss(outputs, self.task.targets([slide.target for slide in slides]))

    def fitted_json(self) -> dict[str, Any]:
        """What config.json keeps of what was fitted."""
        return {name: fitted.to_json() for name, fitted in self.fitted.items()}


class PartMeasure(NamedTuple):
    """The metrics of one of several targets.

    Attributes:
        name: the target's.
        first: the metric that stands for it in the mean.
        rows: int64, the slides that have it.
        measure: counts of these rows -> its metrics.
    """

    name: str
    first: str
    rows: IntArray
    measure: Measure


def measured(parts: Sequence[PartMeasure], counts: IntArray) -> dict[str, FloatArray]:
    """Metrics of all targets; a resample without a slide of one leaves its metrics, and the mean, undefined."""
    values: dict[str, FloatArray] = {}
    first: list[FloatArray] = []
    for part in parts:
        some = counts[:, part.rows]
        there = some.sum(axis=1) > 0
        # A measure divides by the slides drawn: where there is none it is asked of one each, and not told.
        of_part = part.measure(np.where(there[:, None], some, 1))
        told = {name: np.where(there, value, math.nan) for name, value in of_part.items()}
        values |= {of_target(part.name, name): value for name, value in told.items()}
        first.append(told[part.first])
    return {MEAN: np.mean(first, axis=0), **values}


Answers = TaskAnswers | SeveralAnswers


def answers_of(config: ModelConfig) -> Answers | None:
    """What a model's config.json says of its answers; None of classification."""
    task = config.target_task
    if isinstance(task, SeveralTargets):
        fitted = config.task.get(KEY, {})
        return SeveralAnswers(task, {name: Fitted.of_config({KEY: of_part}) for name, of_part in fitted.items()})
    return TaskAnswers.of(config)


def splits_of(answers: Answers) -> list[str]:
    """The splits on whose outputs something is fitted."""
    if isinstance(answers, TaskAnswers):
        each = [splits_fitted_on(answers.task)]
    else:
        each = [splits_fitted_on(task) for task in answers.task.tasks]
    return [split for split in dict.fromkeys(each) if split is not None]


def fit_answers(answers: Answers, outputs: Mapping[str, Tensor], slides: Mapping[str, Sequence[SlideEntry]]) -> Answers:
    """The answers with what is fitted on outputs of the exported weights, see `fitted_on`."""
    if isinstance(answers, TaskAnswers):
        return replace(answers, fitted=fitted_on(answers.fitted, answers.task, outputs, slides))
    fitted = dict(answers.fitted)
    for part in answers.task.parts:
        split = splits_fitted_on(part.task)
        if split is not None and split in outputs:
            of_part = {split: outputs[split][:, part.outputs]}
            own_slides = {split: [with_target(slide, part.task.kind, part.values) for slide in slides[split]]}
            fitted[part.name] = fitted_on(answers.own(part).fitted, part.task, of_part, own_slides)
    return replace(answers, fitted=fitted)
