"""Outputs of slides as answers, and their metrics: of an epoch, of a split, and of resamples of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.evaluation.bootstrap import Measure
from ds_wsi.evaluation.task_metrics.measured import Measured
from ds_wsi.evaluation.task_metrics.multilabel import multilabel_metrics, weighted_multilabel_metrics
from ds_wsi.evaluation.task_metrics.ordinal import ordinal_metrics, weighted_ordinal_metrics
from ds_wsi.evaluation.task_metrics.regression import regression_metrics, weighted_regression_metrics
from ds_wsi.evaluation.task_metrics.survival import (
    SurvivalPredictions,
    survival_metrics,
    survival_predictions,
    weighted_survival_metrics,
)
from ds_wsi.evaluation.tasks.fitted import EVEN, Fitted, follow_up_of, survival_at
from ds_wsi.models.config import ModelConfig
from ds_wsi.targets.ordinal import class_chances, decided_class
from ds_wsi.targets.several import SeveralTargets
from ds_wsi.targets.task import Task


@dataclass(frozen=True)
class TaskAnswers:
    """How a model's outputs are answers, and how these are measured; it can be sent to another process.

    Attributes:
        task: what slides are asked.
        fitted: what was fitted on the run's own splits.
    """

    task: Task
    fitted: Fitted = field(default_factory=Fitted)

    @classmethod
    def of(cls, config: ModelConfig) -> "TaskAnswers | None":
        """What a model's config.json says of its answers; None of classification."""
        task = config.target_task
        assert not isinstance(task, SeveralTargets), "of several targets `answers_of` tells"
        return None if task is None else cls(task, Fitted.of_config(config.task))

    # ------------------------------------------------------------------------------------------- metrics

    def measures(self, outputs: Sequence[Tensor], slides: Sequence[SlideEntry]) -> list[Measure]:
        """One measure per run of the protocol, for the bootstrap.

        Args:
            outputs: outputs of each run, [N, ...] on the host.
            slides: N, each of which has a target.
        """
        return [self._measure(run, slides) for run in outputs]

    def _measure(self, outputs: Tensor, slides: Sequence[SlideEntry]) -> Measure:
        task, targets = self.task, self._targets(slides)
        answers = task.answers(outputs)
        if task.kind == "regression":
            return partial(weighted_regression_metrics, targets[:, 0], answers[:, 0].numpy())
        if task.kind == "ordinal":
            grades = targets[:, 0].astype(np.int64)
            return partial(weighted_ordinal_metrics, grades, decided_class(answers).numpy(), len(task.classes))
        if task.kind == "multilabel":
            return partial(weighted_multilabel_metrics, targets, answers.numpy(), task.classes)
        return partial(weighted_survival_metrics, self._survival(outputs, slides), self.fitted.reference)

    def metrics(self, outputs: Tensor, slides: Sequence[SlideEntry]) -> dict[str, Measured]:
        """The metrics of slides, each of which has a target, with the reasons where some are undefined.

        Args:
            outputs: [N, ...] on the host.
            slides: N.
        """
        task, targets, names = self.task, self._targets(slides), [slide.slide_id for slide in slides]
        answers = task.answers(outputs)
        if task.kind == "regression":
            return regression_metrics(targets[:, 0], answers[:, 0].numpy(), slide_ids=names)
        if task.kind == "ordinal":
            decided = decided_class(answers).numpy()
            return ordinal_metrics(targets[:, 0].astype(np.int64), decided, len(task.classes), slide_ids=names)
        if task.kind == "multilabel":
            return multilabel_metrics(targets, answers.numpy(), task.classes, slide_ids=names)
        return survival_metrics(self._survival(outputs, slides), self.fitted.reference)

    def epoch_metrics(self, outputs: Tensor, slides: Sequence[SlideEntry]) -> dict[str, float]:
        """The loss and the metrics of a split that is validated, keys prefixed with `eval_`; undefined ones left out.

        Args:
            outputs: [N, ...] on the host.
            slides: N; those without a target count nowhere.
        """
        return told_of_epoch(self, outputs, slides)

    def mean_loss(self, outputs: Tensor, slides: Sequence[SlideEntry]) -> float:
        """The loss of slides, per unit; of cox that of them all as one step, within strata."""
        names = {name: number for number, name in enumerate(sorted({slide.stratum or "" for slide in slides}))}
        strata = [names[slide.stratum or ""] for slide in slides]
        return self.task.mean_loss(outputs, self.task.targets([slide.target for slide in slides]), strata)

    def fitted_json(self) -> dict[str, Any]:
        """What config.json keeps of what was fitted."""
        return self.fitted.to_json()

    def _targets(self, slides: Sequence[SlideEntry]) -> np.ndarray:
        targets: np.ndarray = self.task.targets([slide.target for slide in slides]).numpy()
        return targets

    def _survival(self, outputs: Tensor, slides: Sequence[SlideEntry]) -> SurvivalPredictions:
        reference = self.fitted.reference
        survival = None
        if reference is not None and len(reference.times):
            survival = survival_at(self.task, self.fitted, outputs, slides, reference.times)
        strata = [slide.stratum or "" for slide in slides] if self.task.strata_column else None
        return survival_predictions(
            follow_up_of(slides),
            self.task.answers(outputs)[:, 0].numpy(),
            survival=survival,
            strata=strata,
            slide_ids=[slide.slide_id for slide in slides],
        )

    # ------------------------------------------------------------------------------------------- answers

    def grade_chances(self, answers: Tensor) -> Tensor:
        """An ordinal's probabilities of the grades, [N, K], of P(y > k)."""
        return class_chances(answers)

    def label_threshold(self, index: int) -> float:
        """The probability from which a label is predicted."""
        thresholds = self.fitted.thresholds
        value = math.nan if thresholds is None else thresholds.values[index]
        return EVEN if math.isnan(value) else value

    def mean_answers(self, outputs: Sequence[Tensor]) -> Tensor:
        """The answers' mean over the protocol's runs, float64 [N, m]."""
        return torch.stack([self.task.answers(run) for run in outputs]).mean(0)

    def mean_survival(
        self, outputs: Sequence[Tensor], slides: Sequence[SlideEntry], times: np.ndarray
    ) -> np.ndarray | None:
        """The survival probabilities' mean over the protocol's runs, float64 [N, T]; None where none is told."""
        each = [survival_at(self.task, self.fitted, run, slides, times) for run in outputs]
        told = [survival for survival in each if survival is not None]
        return np.mean(told, axis=0) if told else None


class _Measuring(Protocol):
    """What `TaskAnswers` is, and of several targets `SeveralAnswers`."""

    def metrics(self, outputs: Tensor, slides: Sequence[SlideEntry]) -> dict[str, Measured]: ...

    def mean_loss(self, outputs: Tensor, slides: Sequence[SlideEntry]) -> float: ...


def told_of_epoch(answers: _Measuring, outputs: Tensor, slides: Sequence[SlideEntry]) -> dict[str, float]:
    """The loss and metrics of an epoch's validation; see `TaskAnswers.epoch_metrics`."""
    labelled_rows = [row for row, slide in enumerate(slides) if slide.is_labelled]
    some, outputs = [slides[row] for row in labelled_rows], outputs[labelled_rows]
    values = {"eval_loss": answers.mean_loss(outputs, some)} if some else {}
    if some:
        values |= {f"eval_{name}": measured.value for name, measured in answers.metrics(outputs, some).items()}
    # JSON has no NaN. An epoch without eval_loss would not count as validated.
    return {name: value for name, value in values.items() if not math.isnan(value) or name == "eval_loss"}


def run_outputs(of_slides: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of each run, [N, ...], of each slide's, [R, ...]: in float64, on the host."""
    return list(torch.stack([output.double().cpu() for output in of_slides], dim=1))


def reasons(values: Mapping[str, Measured]) -> dict[str, str]:
    """Metric -> why it is undefined, or what was left out of it."""
    return {name: measured.reason for name, measured in values.items() if measured.reason}
