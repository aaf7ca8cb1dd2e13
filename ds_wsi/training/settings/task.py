"""What a run's slides are asked."""

from dataclasses import dataclass

from ds_wsi.bags.target_columns import TargetColumns
from ds_wsi.runtime.setting import FLAG, Decides, names, setting
from ds_wsi.targets.choices import ALL_LOSSES, CLASSIFICATION, KINDS, LOSSES_OF, TIES

SURVIVAL = ("task", ("survival",))
POS_WEIGHTS = ("none", "balanced")


@dataclass(frozen=True)
class TaskSettings:
    """The task."""

    task: str = setting(
        CLASSIFICATION,
        "what each slide is asked: its class, a value, a grade, several labels, or survival",
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
        needs=("task", ("multilabel",)),
    )
    log1p: bool = setting(
        False,
        "learn log(1 + value) of a skewed value; predictions are in its own unit",
        Decides.RESULT,
        option="log1p",
        kind=FLAG,
        needs=("task", ("regression",)),
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
        """Refuse what is no such number, or no such task."""
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
        return bool(self.label_column or self.time_column or self.event_column or self.censorship_column)

    @property
    def chosen_loss(self) -> str:
        """The loss given, or the first of the task's."""
        return self.loss or LOSSES_OF[self.task][0]

    @property
    def columns(self) -> TargetColumns:
        """The columns of the table that hold the targets."""
        if self.task == "survival":
            event = self.event_column or self.censorship_column
            censored = self.event_column is None
            return TargetColumns(self.task, (), self.time_column, event, censored, self.strata_column)
        return TargetColumns(self.task, self.label_column or ("label",))
