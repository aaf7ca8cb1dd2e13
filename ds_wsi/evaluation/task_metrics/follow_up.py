"""How long each slide's patient was followed, and whether the event came."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ds_wsi.evaluation.metrics import FloatArray
from ds_wsi.evaluation.task_metrics.measured import check_length, finite_column, slide_name
from ds_wsi.evaluation.weighted import BoolArray

DECILES = np.arange(1, 10) / 10


@dataclass(frozen=True)
class FollowUp:
    """Follow-up of N slides; `follow_up` makes a checked one.

    Attributes:
        times: float64 [N], to the event or to the end of the follow-up, in the cohort's unit.
        events: bool [N], whether the event came; where not, the slide is censored.
    """

    times: FloatArray
    events: BoolArray

    def __len__(self) -> int:
        return len(self.times)

    def rows(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> "FollowUp":
        """Return the follow-up of some slides: a mask [N] or indices, which may repeat."""
        return FollowUp(self.times[chosen], self.events[chosen])


def follow_up(times: npt.ArrayLike, events: npt.ArrayLike, slide_ids: Sequence[str] | None = None) -> FollowUp:
    """Check times and events.

    Args:
        times: float [N], not negative.
        events: bool or 0 and 1 [N]; 1 is the event. A column of censoring, where 1 is censored, must be turned first.
        slide_ids: N names, for messages.

    Raises:
        ValueError: shapes that do not fit, no slide, a time that is negative or not finite, an event that is neither
            0 nor 1; the first such slide is named.
    """
    time_column = finite_column("times", times, slide_ids=slide_ids)
    wrong = np.flatnonzero(time_column < 0)
    if wrong.size:
        raise ValueError(
            f"times must not be negative, got {time_column[wrong[0]]} ({slide_name(int(wrong[0]), slide_ids)}). "
            "HINT: a time counts from diagnosis or surgery."
        )
    event_column = np.asarray(events)
    check_length("events", event_column.shape, len(time_column))
    wrong = np.flatnonzero(~np.isin(event_column, (0, 1)))
    if wrong.size:
        raise ValueError(
            f"events must be 0 or 1, got {event_column[wrong[0]]!r} ({slide_name(int(wrong[0]), slide_ids)}). "
            "HINT: leave out slides without a follow-up."
        )
    return FollowUp(time_column, event_column.astype(bool))


def per_patient(
    of_slides: FollowUp, risks: npt.ArrayLike, patients: Sequence[str]
) -> tuple[FollowUp, FloatArray, tuple[str, ...]]:
    """Take patients instead of slides: curves and tests that count a patient's slides apart take them as independent.

    Args:
        of_slides: the follow-up of N slides.
        risks: float [N]; a patient's is the mean of the slides'.
        patients: N names.

    Returns:
        The follow-up, the risks (float64 [P]) and the names of P patients, in the order in which they first come.

    Raises:
        ValueError: shapes that do not fit, a patient whose slides have another follow-up; the first one is named.
    """
    risk_column = finite_column("risks", risks, len(of_slides))
    check_length("patients", (len(patients),), len(of_slides))
    first: dict[str, int] = {}
    for row, name in enumerate(patients):
        same = first.setdefault(name, row)
        pair = [(float(of_slides.times[each]), bool(of_slides.events[each])) for each in (same, row)]
        if pair[0] != pair[1]:
            raise ValueError(
                f"a patient's slides must have one follow-up, got time {pair[0][0]:g}, event {pair[0][1]:d} and "
                f"time {pair[1][0]:g}, event {pair[1][1]:d} (patient {name}). HINT: correct the manifest."
            )
    numbers = {name: number for number, name in enumerate(first)}
    of_patient = np.array([numbers[name] for name in patients])
    means = np.bincount(of_patient, weights=risk_column) / np.bincount(of_patient)
    return of_slides.rows(np.array(list(first.values()), dtype=np.int64)), means, tuple(first)


def default_times(training: FollowUp) -> FloatArray:
    """Return the nine inner deciles of the training split's event times, equal ones merged: float64 [T].

    Empty where no event came.
    """
    of_events = training.times[training.events]
    return np.unique(np.quantile(of_events, DECILES)) if of_events.size else np.empty(0)
