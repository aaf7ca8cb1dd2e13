"""What a model is asked, with everything that its loss and its answers need: one object, as config.json keeps it.

All that is taken of data (mean, deviation, borders of bins, weights) is the TRAINING split's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ds_wsi.targets import hazards, ordinal
from ds_wsi.targets.choices import CLASSIFICATION, LOSSES_OF, TIES
from ds_wsi.targets.cox import cox_step
from ds_wsi.targets.denominators import corn_units, labelled_units
from ds_wsi.targets.multilabel import balanced_pos_weight, multilabel_loss
from ds_wsi.targets.regression import Standardisation, regression_loss, standardisation
from ds_wsi.targets.sums import MISSING
from ds_wsi.targets.survival_table import SurvivalTable

Values = Sequence[float | None]  # a bag's targets as the table gives them; None: missing


@dataclass(frozen=True)
class Task:
    """A task other than single-label classification.

    Targets are float64 [B, k] on any device, NaN where missing: of a regression the value in its own unit, of an
    ordinal the index of the grade, of several labels 0 or 1 each, of survival the time and whether the event was seen.

    Attributes:
        kind: a key of `LOSSES_OF`, and not "classification".
        loss: one of its losses.
        columns: names of the table's columns, one per target; of survival the times' and the events'.
        classes: grades in their order, or the labels' names; none of other kinds.
        censored: whether the column of events says who is censored, and not who had the event.
        strata_column: the column of the strata, or None.
        mean, std, log1p: a regression's scale, see `Standardisation`.
        borders, n_requested: bins of the loss nll, see `TimeBins`.
        alpha: nll's, see `hazard_loss`.
        ties: cox's, see `cox_step`.
        pos_weight: factor of each of several labels where it is there; None: 1.
        time_unit: the times' unit in words.
    """

    kind: str
    loss: str
    columns: tuple[str, ...]
    classes: tuple[str, ...] = ()
    censored: bool = False
    strata_column: str | None = None
    mean: float = 0.0
    std: float = 1.0
    log1p: bool = False
    borders: tuple[float, ...] = ()
    n_requested: int = 0
    alpha: float = 0.0
    ties: str = TIES[0]
    pos_weight: tuple[float, ...] | None = None
    time_unit: str = ""

    def __post_init__(self) -> None:
        """Refuse a kind or a loss that there is not, and what is no target of the kind."""
        if self.kind not in LOSSES_OF or self.kind == CLASSIFICATION:
            names = [kind for kind in LOSSES_OF if kind != CLASSIFICATION]
            raise ValueError(f"kind of a task must be one of {', '.join(names)}, got {self.kind!r}")
        if self.loss not in LOSSES_OF[self.kind]:
            raise ValueError(
                f"loss of a {self.kind} must be one of {', '.join(LOSSES_OF[self.kind])}, got {self.loss!r}"
            )
        if len(self.columns) != self.n_values:
            raise ValueError(f"columns of a {self.kind} must be {self.n_values}, got {list(self.columns)}")
        if self.kind == "ordinal" and len(self.classes) < 2:
            raise ValueError(f"an ordinal must have two grades or more, got {list(self.classes)}")

    # ------------------------------------------------------------------------------------------- sizes

    @property
    def n_values(self) -> int:
        """Targets of a bag, k."""
        return {"survival": 2, "multilabel": max(1, len(self.classes))}.get(self.kind, 1)

    @property
    def aggregator_outputs(self) -> int:
        """Numbers per bag that leave the aggregator."""
        if self.kind == "ordinal":
            return 1 if self.loss in ("coral", "link") else len(self.classes) - 1
        if self.kind == "multilabel":
            return len(self.classes)
        return self.bins.n_bins if self.loss == "nll" else 1

    @property
    def n_outputs(self) -> int:
        """Numbers per bag that leave the model: a cumulative link's cuts are among them, see `OrdinalAnswer`."""
        if self.loss == "coral":
            return len(self.classes) - 1
        return len(self.classes) if self.loss == "link" else self.aggregator_outputs

    @property
    def couples(self) -> bool:
        """Whether the loss couples the step's bags, so that it is no sum over them."""
        return self.loss == "cox"

    @property
    def scale(self) -> Standardisation:
        """A regression's scale."""
        return Standardisation(self.mean, self.std, self.log1p)

    @property
    def bins(self) -> hazards.TimeBins:
        """The bins of the loss nll."""
        return hazards.TimeBins(self.borders, self.n_requested)

    # ------------------------------------------------------------------------------------------- targets and losses

    def targets(self, rows: Sequence[Values]) -> Tensor:
        """Targets of bags as the table gives them: float64 [B, k] on the host."""
        nan = float("nan")
        values = [[nan if value is None else float(value) for value in row or (None,) * self.n_values] for row in rows]
        return torch.tensor(values, dtype=torch.float64).reshape(len(rows), self.n_values)

    def labelled(self, targets: Tensor) -> Tensor:
        """Whether each bag has a target, one at least: bool [B]."""
        return ~(targets[:, :1] if self.kind == "survival" else targets).isnan().all(1)

    def units(self, targets: Tensor) -> int:
        """What the step's loss is divided by, see `denominators`; targets on the host."""
        if self.loss == "corn":
            return corn_units(_labels(targets), len(self.classes))
        return labelled_units(targets[:, :1] if self.kind == "survival" else targets)

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum over the labelled bags, connected to the graph: of every loss but cox.

        Args:
            outputs: [B, ...] as the model returns them.
            targets: float64 [B, k], on the outputs' device.
        """
        assert not self.couples, "a Cox loss is of a whole step"
        if self.kind == "regression":
            return regression_loss(outputs, self.scale.apply(targets[:, 0]), self.loss)
        if self.kind == "multilabel":
            weight = None if self.pos_weight is None else torch.tensor(self.pos_weight, dtype=torch.float64)
            return multilabel_loss(outputs, targets, None if weight is None else weight.to(outputs.device))
        if self.loss == "nll":
            bins, events = self.bins.bin_of(targets[:, 0].contiguous()), targets[:, 1] == 1
            return hazards.hazard_loss(outputs, bins, events, alpha=self.alpha)
        labels = _labels(targets)
        if self.loss == "corn":
            return ordinal.corn_loss(outputs, labels)
        if self.loss == "link":
            return ordinal.link_loss(outputs[:, :1], outputs[0, 1:], labels)
        return ordinal.bits_loss(outputs, labels)

    def table(self, scores: Tensor, targets: Tensor, ids: Sequence[int], strata: Sequence[int]) -> SurvivalTable:
        """Bags with their scores as a partial likelihood sees them; targets on the host."""
        return SurvivalTable.of(scores, targets[:, 0], targets[:, 1] == 1, ids, strata)

    def mean_loss(self, outputs: Tensor, targets: Tensor, strata: Sequence[int] | None = None) -> float:
        """The loss of slides, per unit, without their graph; of cox that of them all as one step. NaN without any.

        Args:
            outputs: [N, ...], on the host.
            targets: float64 [N, k].
            strata: N numbers; None: all one.
        """
        units = self.units(targets)
        if not units:
            return float("nan")
        if self.couples:
            if units < 2:
                return float("nan")
            step = cox_step(self.table(outputs, targets, range(len(targets)), strata or [0] * len(targets)), self.ties)
            return step.loss if step.n_events else float("nan")
        return self.loss_sum(outputs.detach().double(), targets).item() / units

    # ------------------------------------------------------------------------------------------- answers

    def above(self, outputs: Tensor) -> Tensor:
        """An ordinal's P(y > k), [B, K - 1]."""
        if self.loss == "corn":
            return ordinal.corn_chances_above(outputs)
        if self.loss == "link":
            return ordinal.link_chances_above(outputs[:, :1], outputs[0, 1:])
        return ordinal.chances_above(outputs)

    def answers(self, outputs: Tensor) -> Tensor:
        """What is told of each bag, float64 [B, m].

        Of a regression the value in its unit; of an ordinal P(y > k); of several labels each one's probability; of
        survival the risk, the higher the sooner the event.
        """
        wide = outputs.detach().double()
        if self.kind == "regression":
            return self.scale.undo(wide[:, :1])
        if self.kind == "ordinal":
            return self.above(wide)
        if self.kind == "multilabel":
            return wide.sigmoid()
        return hazards.hazard_risk(wide)[:, None] if self.loss == "nll" else wide

    # ------------------------------------------------------------------------------------------- files

    def to_json(self) -> dict[str, Any]:
        """Plain values; grades and labels are the model's classes, and are not among them."""
        return {name: value for name, value in asdict(self).items() if name != "classes"}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], classes: Sequence[str]) -> "Task":
        """The task of `to_json`'s values; keys of what was fitted later are passed over.

        Raises:
            ValueError: no such task.
        """
        names = {entry.name for entry in fields(cls)} - {"classes"}
        chosen: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        try:
            return cls(classes=tuple(classes), **{name: value for name, value in chosen.items() if name in names})
        except TypeError as error:
            raise ValueError(f"task of config.json must name kind, loss and columns, got {error}") from error


def fitted_task(task: Task, rows: Sequence[Values], *, time_bins: int, balanced: bool) -> Task:
    """The task with what it takes of the TRAINING split's targets.

    Args:
        task: the task as it was asked for.
        rows: the training slides' targets.
        time_bins: how many bins of time are asked for, of the loss nll.
        balanced: whether labels are weighted by how rare they are.

    Raises:
        ValueError: the targets do not tell it.
    """
    values, targets = asdict(task), task.targets(rows)
    if task.kind == "regression":
        scale = standardisation(targets[:, 0], log1p=task.log1p)
        values |= {"mean": scale.mean, "std": scale.std}
    if task.loss == "nll":
        bins = hazards.time_bins(targets[:, 0], targets[:, 1] == 1, time_bins)
        values |= {"borders": bins.borders, "n_requested": bins.n_requested}
    if task.kind == "multilabel" and balanced:
        values["pos_weight"] = tuple(balanced_pos_weight(targets, task.classes).tolist())
    return Task(**values)


def _labels(targets: Tensor) -> Tensor:
    """Grades as the losses take them, int64 [B]."""
    grades = targets[:, 0]
    return torch.where(grades.isnan(), MISSING, grades).to(torch.int64)
