"""The words of the campaign: a fault, at a moment, of a run under an engine; and what is found of it."""

from dataclasses import dataclass, field

# What a case can fall by; the table has a column for each.
HUNG = "beyond its timeout"
LOST = "something lost"
SILENT = "silent"
STRANGER = "file of others touched"
LEFT = "something left"
TORN = "checkpoint torn"
WAYS = (LOST, SILENT, HUNG, STRANGER, LEFT, TORN)
HELD, FELL, NOT_RUN = "held", "fell", "not run"


@dataclass(frozen=True)
class Moment:
    """The call of this number, from 0, of a function of the package; see `injector.PLACES`.

    Args:
        place: a key of the places.
        number: the call's, in this process.
        delay_s: seconds after the call's begin; the process goes on meanwhile.
    """

    place: str
    number: int = 0
    delay_s: float = 0.0

    def __str__(self) -> str:
        later = f"+{self.delay_s:g}s" if self.delay_s else ""
        return f"{self.place} {self.number}{later}"


@dataclass(frozen=True)
class Shot:
    """What happens in a rank at a moment.

    Args:
        action: a key of `injector.ACTIONS`.
        moment: when.
        rank: the rank that is hit; None: all.
    """

    action: str
    moment: Moment
    rank: int | None = None


@dataclass(frozen=True)
class Case:
    """One trial.

    Args:
        fault: a key of `drills.DRILLS`.
        engine: a key of `engines.ENGINES`.
        ranks: processes.
        at: what the fault's drill reads: a moment, a size, a file.
        rank: the rank that is hit, of several.
        sample: whether it is of the sample that each test run takes.
    """

    fault: str
    engine: str = "plain"
    ranks: int = 1
    at: Moment | str = ""
    rank: int | None = None
    sample: bool = field(default=False, compare=False)

    @property
    def key(self) -> str:
        """Unlike every other case's, and the same tomorrow: results are kept by it."""
        hit = "" if self.rank is None else f" of rank {self.rank}"
        return f"{self.fault}/{self.engine}-{self.ranks}/{self.at}{hit}"


@dataclass
class Outcome:
    """What was found of a case.

    Args:
        status: held, fell, or not run.
        ways: how it fell, in words of `WAYS`.
        detail: what happened, in words.
        codes: the exit statuses of the run that was hit.
        seconds: time on the clock that the whole case took.
    """

    status: str = HELD
    ways: list[str] = field(default_factory=list)
    detail: str = ""
    codes: list[int | None] = field(default_factory=list)
    seconds: float = 0.0

    def fall(self, way: str, detail: str) -> None:
        """Note one more thing that went wrong."""
        self.status = FELL
        if way not in self.ways:
            self.ways.append(way)
        self.detail = f"{self.detail}; {detail}" if self.detail else detail

    def require(self, holds: object, way: str, detail: str) -> None:
        """Note it where it does not hold."""
        if not holds:
            self.fall(way, detail)


class NotRunError(Exception):
    """The machine does not let a case be tried; says why."""
