"""Several targets in one model: their losses summed, each over its own labelled units of the whole step."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_wsi.targets.choices import SEVERAL
from ds_wsi.targets.sums import connected_zero
from ds_wsi.targets.task import Task, Values


class Part(NamedTuple):
    """A target among several, with its places.

    Attributes:
        name: what it is called in options and files.
        task: what is asked, of a sum over bags.
        weight: lambda, the factor of its loss.
        values: where its columns stand in the targets.
        outputs: where its columns stand in the outputs.
        scores: where its columns stand in what leaves the aggregator.
    """

    name: str
    task: Task
    weight: float
    values: slice
    outputs: slice
    scores: slice


@dataclass(frozen=True)
class SeveralTargets:
    """Targets that one model tells at once: one aggregator, whose outputs lie side by side.

    The loss of a step is the sum over targets of lambda_t / D_t times the sum of the target's losses over the step,
    D_t its labelled units there; a target without any in a step is a zero there.

    Args:
        names: what the targets are called, each once.
        tasks: what each asks.
        weights: lambda of each, above 0.
    """

    names: tuple[str, ...]
    tasks: tuple[Task, ...]
    weights: tuple[float, ...]

    kind = SEVERAL
    loss = "sum"
    couples = False
    strata_column = None

    def __post_init__(self) -> None:
        """Refuse targets of one name or column, weights that are no factor, and losses that couple bags."""
        if not len(self.names) == len(self.tasks) == len(self.weights) >= 2:
            raise ValueError(
                f"several targets must be two or more, each with a name and a weight, got {', '.join(self.names)}"
            )
        self.require_names(self.names, self.columns)
        for name, task, weight in zip(self.names, self.tasks, self.weights, strict=True):
            if not 0 < weight < math.inf:
                raise ValueError(f"the weight of target {name} must be positive, got {weight:g}")
            if task.couples:
                raise ValueError(f"the loss of target {name} among several must be a sum over bags, got {task.loss}")

    @staticmethod
    def require_names(names: Sequence[str], columns: Sequence[str]) -> None:
        """Refuse two targets of one name, or of one column."""
        for what, given in (("names", list(names)), ("columns", list(columns))):
            twice = sorted({name for name in given if given.count(name) > 1})
            if twice:
                raise ValueError(f"{what} of targets must differ, got {', '.join(twice)} again")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The targets with their places, in their order."""
        return tuple(self._parts())

    def _parts(self) -> Iterator[Part]:
        value = output = score = 0
        for name, task, weight in zip(self.names, self.tasks, self.weights, strict=True):
            ends = value + task.n_values, output + task.n_outputs, score + task.aggregator_outputs
            yield Part(name, task, weight, slice(value, ends[0]), slice(output, ends[1]), slice(score, ends[2]))
            value, output, score = ends

    # ------------------------------------------------------------------------------------------- as of one task

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of all targets."""
        return tuple(column for task in self.tasks for column in task.columns)

    @property
    def classes(self) -> tuple[str, ...]:
        """None: each target has its own."""
        return ()

    @property
    def n_values(self) -> int:
        """Targets of a bag, k."""
        return sum(task.n_values for task in self.tasks)

    @property
    def aggregator_outputs(self) -> int:
        """Numbers per bag that leave the aggregator."""
        return sum(task.aggregator_outputs for task in self.tasks)

    def targets(self, rows: Sequence[Values]) -> Tensor:
        """Targets of bags as the table gives them: float64 [B, k] on the host, NaN where missing."""
        nan = float("nan")
        values = [[nan if value is None else float(value) for value in row or (None,) * self.n_values] for row in rows]
        return torch.tensor(values, dtype=torch.float64).reshape(len(rows), self.n_values)

    def units(self, targets: Tensor) -> int:
        """Bags with one target or more: what the step's weighted sum is divided by, see `factors`."""
        labelled = torch.stack([part.task.labelled(targets[:, part.values]) for part in self.parts])
        return int(labelled.any(0).sum())

    def factors(self, targets: Tensor) -> tuple[float, ...]:
        """The factor of each target's sum in a step, lambda_t U / D_t with U its `units`; 0 where D_t is.

        Args:
            targets: float64 [B, k], of all bags of the step, on the host.
        """
        units = self.units(targets)
        each = [part.task.units(targets[:, part.values]) for part in self.parts]
        return tuple(weight * units / count if count else 0.0 for weight, count in zip(self.weights, each, strict=True))

    def loss_sum(self, outputs: Tensor, targets: Tensor, factors: Sequence[float]) -> Tensor:
        """Sum over targets and bags, each target's by its factor, connected to the graph.

        Args:
            outputs: [B, ...] as the model returns them.
            targets: float64 [B, k], on the outputs' device.
            factors: see `factors`, of the whole step.
        """
        total = connected_zero(outputs)
        for part, factor in zip(self.parts, factors, strict=True):
            of_part = part.task.loss_sum(outputs[:, part.outputs], targets[:, part.values])
            total = total + factor * of_part
        return total

    def mean_loss(self, outputs: Tensor, targets: Tensor, strata: Sequence[int] | None = None) -> float:
        """The weighted sum of the targets' losses, each per its unit; NaN where none has one.

        Args:
            outputs: [N, ...], on the host.
            targets: float64 [N, k].
            strata: not used: no loss among several compares slides.
        """
        each = [
            part.weight * loss
            for part in self.parts
            if not math.isnan(loss := part.task.mean_loss(outputs[:, part.outputs], targets[:, part.values]))
        ]
        return math.fsum(each) if each else math.nan

    # ------------------------------------------------------------------------------------------- files

    def to_json(self) -> dict[str, Any]:
        """The plain values of each target: its name, weight and classes beside its task's."""
        entries = [
            {"name": name, "weight": weight, "classes": list(task.classes), **task.to_json()}
            for name, task, weight in zip(self.names, self.tasks, self.weights, strict=True)
        ]
        return {"kind": self.kind, "targets": entries}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "SeveralTargets":
        """The targets of `to_json`'s values.

        Raises:
            ValueError: no such targets.
        """
        try:
            entries = list(values["targets"])
            names, weights = [str(entry["name"]) for entry in entries], [float(entry["weight"]) for entry in entries]
            tasks = [Task.from_json(entry, entry["classes"]) for entry in entries]
        except (KeyError, TypeError) as error:
            raise ValueError(f"targets of config.json must have name, weight and classes, got {error!r}") from error
        return cls(tuple(names), tuple(tasks), tuple(weights))


AnyTask = Task | SeveralTargets


def task_from_json(values: Mapping[str, Any], classes: Sequence[str]) -> AnyTask | None:
    """The task of config.json's values; None of an empty one, which is classification.

    Raises:
        ValueError: no such task.
    """
    if not values:
        return None
    return SeveralTargets.from_json(values) if values.get("kind") == SEVERAL else Task.from_json(values, classes)
