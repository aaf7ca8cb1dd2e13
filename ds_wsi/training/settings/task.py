"""What a run's slides are asked."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from ds_wsi.bags.target_columns import TargetColumns
from ds_wsi.runtime.setting import FLAG, Decides, names, setting
from ds_wsi.targets.choices import ALL_LOSSES, CLASSIFICATION, KINDS, LOSSES_OF, SEVERAL, TIES

SURVIVAL = ("task", ("survival", SEVERAL))
POS_WEIGHTS = ("none", "balanced")


class AskedTarget(NamedTuple):
    """One of `--targets`.

    Attributes:
        name: the target's.
        kind: the kind of task.
        loss: one of the kind's.
        weight: the factor of its loss.
    """

    name: str
    kind: str
    loss: str
    weight: float

    @classmethod
    def of(cls, word: str) -> "AskedTarget":
        """The target of NAME:KIND or NAME:KIND:WEIGHT, where a loss stands for its kind.

        Raises:
            ValueError: another form, kind or weight.
        """
        name, kind, *rest = word.split(":") if ":" in word else (word, "")
        try:
            weight = float(rest[0]) if rest else 1.0
        except ValueError:
            weight = math.nan
        if not name or not kind or len(rest) > 1 or not 0 < weight < math.inf:
            raise ValueError(
                f"--targets must be NAME:KIND or NAME:KIND:WEIGHT with a weight above 0, got {word!r}. HINT: such as "
                "til:regression,grade:ordinal:0.5"
            )
        kinds = [one for one in LOSSES_OF if one != CLASSIFICATION]
        of_loss = {loss: one for one in kinds for loss in LOSSES_OF[one]}
        if kind not in kinds and kind not in of_loss:
            raise ValueError(
                f"the kind of a target must be one of {', '.join([*kinds, *of_loss])}, got {kind!r} ({word}). HINT: "
                "two classes are multilabel, ordered ones ordinal."
            )
        if kind == "cox":
            raise ValueError(
                f"the loss of a target among several must be a sum over slides, got cox ({word}), which couples the "
                f"slides of a step. HINT: {name}:survival, by hazards in bins of time, or --task survival --loss cox "
                "alone."
            )
        return cls(name, of_loss.get(kind, kind), kind if kind in of_loss else LOSSES_OF[kind][0], weight)


@dataclass(frozen=True)
class TaskSettings:
    """The task."""

    task: str = setting(
        CLASSIFICATION,
        "what each slide is asked: its class, a value, a grade, several labels, survival, or several --targets",
        Decides.RESULT,
        option="task",
        kind=KINDS,
        column=True,
    )
    loss: str | None = setting(
        None,
        "loss of the task: huber, mse or mae; bits, corn, coral or link; bce; nll or cox",
        Decides.RESULT,
        option="loss",
        kind=ALL_LOSSES,
        words="the first of the task's",
    )
    targets: tuple[str, ...] = setting(
        (),
        "several targets, each NAME:KIND or NAME:KIND:WEIGHT, such as til:regression,grade:ordinal:0.5; NAME is the "
        "column, of survival a word; a KIND can be a loss",
        Decides.RESULT,
        option="targets",
        kind=names,
        words="one, that of --task",
    )
    label_column: tuple[str, ...] = setting(
        (),
        "column of the class, value or grade; of several labels theirs, comma-separated",
        Decides.RESOLVED,
        resolved="slides",
        option="label_column",
        kind=names,
        words="label; of the demo its own",
    )
    time_column: str | None = setting(
        None,
        "column of the times to the event or to the end of the follow-up",
        Decides.RESOLVED,
        resolved="slides",
        option="time_column",
        words="none; of the demo its own",
        needs=SURVIVAL,
    )
    event_column: str | None = setting(
        None,
        "column that says who had the event: 1, yes, dead; 0 is censored",
        Decides.RESOLVED,
        resolved="slides",
        option="event_column",
        words="none; of the demo its own",
        needs=SURVIVAL,
    )
    censorship_column: str | None = setting(
        None,
        "column that says who is censored: 1, yes, alive; 0 had the event",
        Decides.RESOLVED,
        resolved="slides",
        option="censorship_column",
        words="none",
        needs=SURVIVAL,
    )
    strata_column: str | None = setting(
        None,
        "column of strata, such as centres, within which slides are compared",
        Decides.RESOLVED,
        resolved="slides",
        option="strata_column",
        words="none, all are compared",
        needs=SURVIVAL,
    )
    time_bins: int = setting(
        4,
        "number of bins of time of --loss nll, between quantiles of the training split's event times",
        Decides.RESULT,
        option="time_bins",
        needs=SURVIVAL,
    )
    nll_alpha: float = setting(
        0.0,
        "how far --loss nll leaves the censored out, 0 to 1; 0 is the likelihood",
        Decides.RESULT,
        option="nll_alpha",
        needs=SURVIVAL,
    )
    ties: str = setting(
        TIES[0], "how --loss cox takes events of one time", Decides.RESULT, option="ties", kind=TIES, needs=SURVIVAL
    )
    pos_weight: str = setting(
        POS_WEIGHTS[0],
        "weight of the slides that have a label: balanced is the training split's quotient of those without and with",
        Decides.RESULT,
        option="pos_weight",
        kind=POS_WEIGHTS,
        needs=("task", ("multilabel", SEVERAL)),
    )
    log1p: bool = setting(
        False,
        "learn log(1 + value) of a skewed value; predictions are in its own unit",
        Decides.RESULT,
        option="log1p",
        kind=FLAG,
        needs=("task", ("regression", SEVERAL)),
    )
    time_unit: str = setting(
        "",
        "unit of the times in words, such as months, for plots",
        Decides.NOTHING,
        option="time_unit",
        words="none; of the demo its own",
        needs=SURVIVAL,
    )

    def __post_init__(self) -> None:
        """Take --targets as --task several; refuse what is no such number, or no such task."""
        if self.targets and self.task == CLASSIFICATION:
            object.__setattr__(self, "task", SEVERAL)
        if self.task not in KINDS:
            raise ValueError(f"--task must be one of {', '.join(KINDS)}, got {self.task!r}")
        if self.time_bins < 2:
            raise ValueError(f"--time_bins must be at least 2, got {self.time_bins}. HINT: --time_bins 4")
        if not 0 <= self.nll_alpha <= 1:
            raise ValueError(f"--nll_alpha must be in [0, 1], got {self.nll_alpha}. HINT: 0 is the likelihood.")

    @property
    def is_classes(self) -> bool:
        """Whether each slide has one class."""
        return self.task == CLASSIFICATION

    @property
    def names_columns(self) -> bool:
        """Whether a column of targets is named."""
        return bool(
            self.targets or self.label_column or self.time_column or self.event_column or self.censorship_column
        )

    @property
    def chosen_loss(self) -> str:
        """The loss given, or the first of the task's; of several targets their sum."""
        return self.loss or LOSSES_OF.get(self.task, ("sum",))[0]

    @property
    def columns(self) -> TargetColumns:
        """The columns of the table that hold the targets."""
        if self.task == SEVERAL:
            parts = (self._columns_of(target) for target in self.asked_targets)
            return TargetColumns(SEVERAL, (), parts=tuple(parts))
        if self.task == "survival":
            return self._survival_columns()
        return TargetColumns(self.task, self.label_column or ("label",))

    @property
    def asked_targets(self) -> tuple[AskedTarget, ...]:
        """What --targets asks for.

        Raises:
            ValueError: words that are no target.
        """
        return tuple(AskedTarget.of(word) for word in self.targets)

    def _columns_of(self, target: AskedTarget) -> TargetColumns:
        if target.kind == "survival":
            return self._survival_columns(target.name)
        return TargetColumns(target.kind, (target.name,), name=target.name)

    def _survival_columns(self, name: str = "") -> TargetColumns:
        event, censored = self.event_column or self.censorship_column, self.event_column is None
        return TargetColumns("survival", (), self.time_column, event, censored, self.strata_column, name)
