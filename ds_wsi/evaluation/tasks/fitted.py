"""What a run fits on its own splits for its task, as config.json keeps it: nothing of it comes from the test split."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.evaluation.task_metrics.follow_up import FollowUp, default_times, follow_up
from ds_wsi.evaluation.task_metrics.multilabel import fit_label_thresholds
from ds_wsi.evaluation.task_metrics.over_time import (
    TrainingReference,
    reference_from_json,
    reference_to_json,
    training_reference,
)
from ds_wsi.evaluation.task_metrics.risk_groups import RiskCutoffs, fit_risk_cutoffs
from ds_wsi.evaluation.task_metrics.thresholds import FITTED_ON, Thresholds
from ds_wsi.runtime.files import json_number
from ds_wsi.targets.baseline import Baseline, breslow_baseline
from ds_wsi.targets.task import Task

KEY = "fitted"  # in config.json's task
EVEN = 0.5  # the threshold of a label to which none could be fitted


@dataclass(frozen=True)
class Fitted:
    """What was fitted.

    Attributes:
        reference: the training split's follow-up, of survival; it is there before training.
        baselines: stratum -> baseline hazard, of cox, by the exported weights on the training split.
        cutoffs: risk at which survival's groups are cut, the median of the training split's.
        thresholds: probability from which each of several labels is predicted, by the exported weights on the
            validation split; None: `EVEN` of each.
    """

    reference: TrainingReference | None = None
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    cutoffs: RiskCutoffs | None = None
    thresholds: Thresholds | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for config.json."""
        values: dict[str, Any] = {}
        if self.reference is not None:
            values["reference"] = reference_to_json(self.reference)
        if self.baselines:
            values["baselines"] = {name: asdict(baseline) for name, baseline in self.baselines.items()}
        if self.cutoffs is not None:
            values["cutoffs"] = asdict(self.cutoffs)
        if self.thresholds is not None:
            numbers = [json_number(value) for value in self.thresholds.values]
            values["thresholds"] = {**asdict(self.thresholds), "values": numbers}
        return values

    @classmethod
    def of_config(cls, task: Mapping[str, Any]) -> "Fitted":
        """What a config.json's task holds.

        Raises:
            ValueError: values that are none of `to_json`.
        """
        values = task.get(KEY, {})
        try:
            reference = reference_from_json(values["reference"]) if "reference" in values else None
            baselines = {name: _baseline_of(entry) for name, entry in values.get("baselines", {}).items()}
            cutoffs, thresholds = values.get("cutoffs"), values.get("thresholds")
            return cls(
                reference,
                baselines,
                None if cutoffs is None else RiskCutoffs(tuple(cutoffs["values"]), cutoffs["split"]),
                None if thresholds is None else _thresholds_of(thresholds),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"task of config.json must hold what was fitted, got {error!r}. HINT: copy the whole folder again."
            ) from error


def _baseline_of(entry: Mapping[str, Any]) -> Baseline:
    return Baseline(tuple(entry["times"]), tuple(entry["log_hazards"]), float(entry["last_time"]))


def _thresholds_of(entry: Mapping[str, Any]) -> Thresholds:
    numbers = tuple(math.nan if value is None else float(value) for value in entry["values"])
    return Thresholds(numbers, entry["split"], tuple((name, reason) for name, reason in entry["reasons"]))


def follow_up_of(slides: Sequence[SlideEntry]) -> FollowUp:
    """The follow-up of slides that have one."""
    columns = np.array([slide.target for slide in slides], dtype=np.float64).reshape(-1, 2)
    return follow_up(columns[:, 0], columns[:, 1])


def before_training(task: Task, training: Sequence[SlideEntry]) -> Fitted:
    """What is known of the training split before anything is trained."""
    if task.kind != "survival":
        return Fitted()
    labelled_rows = follow_up_of([slide for slide in training if slide.is_labelled])
    times = default_times(labelled_rows)
    if task.loss == "nll":  # beyond the last border the model tells no probability
        times = times[times <= max(task.borders, default=0.0)]
    return Fitted(training_reference(labelled_rows, times))


def splits_fitted_on(task: Task) -> str | None:
    """The split on whose outputs something is fitted; None of a task that needs nothing."""
    return {"survival": "train", "multilabel": FITTED_ON}.get(task.kind)


def fitted_on(
    before: Fitted, task: Task, outputs: Mapping[str, Tensor], slides: Mapping[str, Sequence[SlideEntry]]
) -> Fitted:
    """What is fitted on the outputs of the exported weights.

    Args:
        before: what was known before.
        task: the run's.
        outputs: split -> outputs of its slides, [N, ...] on the host: of survival "train", of several labels
            "validation", where there is one.
        slides: the same splits' slides.
    """
    if task.kind == "multilabel" and FITTED_ON in outputs:
        targets = task.targets([slide.target for slide in slides[FITTED_ON]]).numpy()
        chances = task.answers(outputs[FITTED_ON]).numpy()
        return replace(before, thresholds=fit_label_thresholds(targets, chances, task.classes, split=FITTED_ON))
    if task.kind != "survival":
        return before
    labelled_rows = [row for row, slide in enumerate(slides["train"]) if slide.is_labelled]
    some, scores = [slides["train"][row] for row in labelled_rows], outputs["train"][labelled_rows]
    cutoffs = fit_risk_cutoffs(task.answers(scores)[:, 0].numpy())
    if task.loss != "cox":
        return replace(before, cutoffs=cutoffs)
    baselines = {}
    for name in sorted({slide.stratum or "" for slide in some}):
        rows = [row for row, slide in enumerate(some) if (slide.stratum or "") == name]
        of_stratum = [some[row].target for row in rows]
        if any(target[1] == 1 for target in of_stratum):
            table = task.table(scores[rows], task.targets(of_stratum), rows, [0] * len(rows))
            baselines[name] = breslow_baseline(table)[0]
    return replace(before, cutoffs=cutoffs, baselines=baselines)


def survival_at(
    task: Task, fitted: Fitted, outputs: Tensor, slides: Sequence[SlideEntry], times: np.ndarray
) -> np.ndarray | None:
    """Probabilities of no event by each time, float64 [N, T], NaN where the model tells none; None of a loss without.

    Args:
        task, fitted: the model's.
        outputs: [N, ...], on the host.
        slides: N.
        times: [T], in the unit of the training times.
    """
    from ds_wsi.targets.hazards import survival_curve

    at = torch.from_numpy(np.asarray(times, dtype=np.float64))
    if task.loss == "nll":
        curves: np.ndarray = survival_curve(outputs, task.bins, at).numpy()
        return curves
    if not fitted.baselines:
        return None
    survival = np.full((len(slides), len(times)), np.nan)
    for row, slide in enumerate(slides):
        baseline = fitted.baselines.get(slide.stratum or "")
        if baseline is not None:
            survival[row] = baseline.survival(outputs[row : row + 1], at)[0].numpy()
    return survival
