"""Groups of slides by predicted risk: cut where the training split says, compared on slides that it does not hold."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ds_wsi.evaluation.metrics import FloatArray, IntArray
from ds_wsi.evaluation.task_metrics.follow_up import FollowUp
from ds_wsi.evaluation.task_metrics.hazard_ratio import HazardRatio, hazard_ratio, undefined_ratio
from ds_wsi.evaluation.task_metrics.kaplan_meier import SurvivalCurve, kaplan_meier
from ds_wsi.evaluation.task_metrics.log_rank import LogRank, log_rank
from ds_wsi.evaluation.task_metrics.measured import finite_column

GROUP_NAMES = {2: ("low risk", "high risk"), 3: ("low risk", "middle risk", "high risk")}


@dataclass(frozen=True)
class RiskCutoffs:
    """Where risks are cut into groups.

    Attributes:
        values: ascending, each once; a risk above a value belongs to the group above it.
        split: the split that they were taken from.
    """

    values: tuple[float, ...]
    split: str = "train"


@dataclass(frozen=True)
class RiskGroups:
    """Groups of slides and how their survival differs.

    Attributes:
        curves: name -> Kaplan-Meier curve, of groups that have slides, the lowest risk first.
        test: log-rank over all groups.
        ratio: hazard ratio of the highest group against the lowest.
    """

    curves: Mapping[str, SurvivalCurve]
    test: LogRank
    ratio: HazardRatio


def fit_risk_cutoffs(risks: npt.ArrayLike, n_groups: int = 2, *, split: str = "train") -> RiskCutoffs:
    """Take the quantiles that cut risks into groups of one size; of two groups the median.

    Args:
        risks: float [N], of the training split.
        n_groups: how many, at least 2. Equal quantiles are merged, and the groups are fewer.
        split: the split of these slides.

    Raises:
        ValueError: fewer than two groups, risks that are not finite, the test split.
    """
    if n_groups < 2:
        raise ValueError(f"n_groups must be at least 2, got {n_groups}")
    if split == "test":
        raise ValueError(f"cut-offs must not be fitted on the {split} split. HINT: take the training split's risks.")
    quantiles = np.unique(np.quantile(finite_column("risks", risks), np.arange(1, n_groups) / n_groups))
    return RiskCutoffs(tuple(float(value) for value in quantiles), split)


def risk_group(risks: npt.ArrayLike, cutoffs: RiskCutoffs) -> IntArray:
    """Return each slide's group: int64 [N], 0 is the lowest risk; a risk equal to a cut-off is below it.

    Raises:
        ValueError: risks that are not finite.
    """
    return np.searchsorted(np.array(cutoffs.values), finite_column("risks", risks), side="left").astype(np.int64)


def group_names(cutoffs: RiskCutoffs) -> tuple[str, ...]:
    """Return the groups' names, the lowest risk first."""
    n_groups = len(cutoffs.values) + 1
    numbered = tuple(f"risk group {number + 1} of {n_groups}" for number in range(n_groups))
    return GROUP_NAMES.get(n_groups, numbered)


def compare_risk_groups(
    follow_up: FollowUp, risks: npt.ArrayLike, cutoffs: RiskCutoffs, *, split: str, confidence: float = 0.95
) -> RiskGroups:
    """Compare the survival of risk groups.

    On the split that the cut-offs were taken from, curves are drawn, but p-values and the hazard ratio's interval are
    undefined: the model has seen these slides' follow-up, and any model that learns by heart parts them.

    Args:
        follow_up: the follow-up of N slides, or of patients where some have several: see `per_patient`.
        risks: float [N].
        cutoffs: see `fit_risk_cutoffs`.
        split: the split of these slides.
        confidence: the intervals' level, in (0, 1).

    Raises:
        ValueError: risks that do not fit or are not finite, confidence out of range.
    """
    groups = risk_group(finite_column("risks", risks, len(follow_up)), cutoffs)
    names = group_names(cutoffs)
    curves = {
        names[group]: kaplan_meier(follow_up.rows(groups == group), confidence=confidence)
        for group in np.unique(groups)
    }
    test = log_rank(follow_up, groups)
    ratio = _highest_against_lowest(follow_up, groups, len(names) - 1, confidence)
    if split != cutoffs.split:
        return RiskGroups(curves, test, ratio)
    reason = f"the cut-offs were taken from this split, {split}: a p-value would be too small"
    return RiskGroups(
        curves,
        replace(test, statistic=math.nan, p_value=math.nan, reason=test.reason or reason),
        replace(ratio, low=math.nan, high=math.nan, p_value=math.nan, reason=ratio.reason or reason),
    )


def _highest_against_lowest(follow_up: FollowUp, groups: IntArray, highest: int, confidence: float) -> HazardRatio:
    ends = (groups == 0) | (groups == highest)
    missing = [end for end in dict.fromkeys((0, highest)) if not (groups == end).any()]
    if missing or highest == 0:
        which = "highest" if highest in missing else "lowest"
        return undefined_ratio(confidence, f"no slide is in the group of the {which} risk")
    return hazard_ratio(follow_up.rows(ends), (groups[ends] == highest).astype(np.float64), confidence=confidence)


def curve_rows(curves: Mapping[str, SurvivalCurve]) -> list[dict[str, str | float]]:
    """Return the numbers behind the curves, one row per group and time, for a table."""
    columns = ("times", "at_risk", "events", "censored", "survival", "low", "high")
    rows: list[dict[str, str | float]] = []
    for name, curve in curves.items():
        arrays: list[FloatArray] = [getattr(curve, column) for column in columns]
        rows += [{"group": name, **dict(zip(columns, map(float, row)))} for row in zip(*arrays)]
    return rows
