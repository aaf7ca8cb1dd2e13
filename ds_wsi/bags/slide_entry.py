"""One row of a cohort: a slide, or a patient with the slides of a bag; and patients that are in several splits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_wsi.bags.target_columns import Target

SLIDE_IDS = ";"  # between the slides of a patient in tables: no slide_id has one
NAMES = ("slide_id", "patient_id", "slide_ids")  # columns that name a bag in tables of predictions


@dataclass(frozen=True)
class SlideEntry:
    """One slide of the cohort; where bags are of patients, one patient.

    Attributes:
        slide_id: unique; names the slide in every output. A patient's is the patient_id.
        path: the slide's file; in a cohort of features it need not be there.
        label: index into the manifest's classes; None where the slide has none.
        patient_id: the slide's own id where the manifest has no patients.
        split: train, validation, test, or None where not yet assigned.
        mpp: overrides the file's own, um/px.
        center: where the slide was scanned, if known.
        target: what the table answers to another task than classification, see `ds_wsi.targets.task.Task`; a grade is
            the label too. Empty: nothing was read.
        stratum: name of the stratum, of survival; None: there are no strata.
        members: a patient's slides, in the order of their ids; empty of a slide.
    """

    slide_id: str
    path: Path
    label: int | None
    patient_id: str
    split: str | None = None
    mpp: float | None = None
    center: str | None = None
    target: Target = ()
    stratum: str | None = None
    members: tuple["SlideEntry", ...] = ()

    @property
    def is_labelled(self) -> bool:
        """Whether anything is known of what the slide is asked."""
        return self.label is not None or any(value is not None for value in self.target)

    @property
    def class_index(self) -> int:
        """The label of a slide that has one."""
        assert self.label is not None, self.slide_id
        return self.label

    @property
    def slides(self) -> tuple["SlideEntry", ...]:
        """The slide, or the patient's slides."""
        return self.members or (self,)

    @property
    def words(self) -> str:
        """What messages call it."""
        return f"{'patient' if self.members else 'slide'} {self.slide_id}"


def slides_of_rows(rows: Sequence[SlideEntry]) -> tuple[SlideEntry, ...]:
    """The slides of these rows, each patient's together."""
    return tuple(slide for row in rows for slide in row.slides)


def patient_problems(slides: Sequence[SlideEntry]) -> list[str]:
    """Name each patient whose slides are in more than one split."""
    places: dict[str, dict[str, list[str]]] = {}
    for slide in slides:
        places.setdefault(slide.patient_id, {}).setdefault(str(slide.split), []).append(slide.slide_id)
    return [
        f"patient {patient} must be in one split, got "
        + " and ".join(f"{split} ({', '.join(ids)})" for split, ids in splits.items())
        for patient, splits in places.items()
        if len(splits) > 1
    ]


def bag_names(entry: SlideEntry) -> dict[str, str]:
    """The columns that name a bag: slide_id and patient_id, or a patient's patient_id and slide_ids."""
    if not entry.members:
        return {"slide_id": entry.slide_id, "patient_id": entry.patient_id}
    return {"patient_id": entry.patient_id, "slide_ids": SLIDE_IDS.join(slide.slide_id for slide in entry.members)}


def bag_word(entries: Sequence[SlideEntry]) -> str:
    """What these rows of a cohort are, in a word: "slide", or "patient"."""
    return "patient" if any(entry.members for entry in entries) else "slide"
