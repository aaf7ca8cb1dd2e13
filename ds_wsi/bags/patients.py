"""Bags of patients: all slides of a patient in one bag, in the order of their ids."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ds_wsi.bags.cohort import Cohort
from ds_wsi.bags.joined import JoinedGrid
from ds_wsi.bags.manifest import Manifest, ManifestError
from ds_wsi.bags.slide_entry import SlideEntry
from ds_wsi.bags.tables.names import is_slide_id


def by_patient(cohort: Cohort, *, labels: str = "required") -> Cohort:
    """The cohort with a row per patient, in the order of each one's first slide, wherever the others stand.

    A patient's tiles are those of its slides, slide after slide in the order of their ids.

    Args:
        cohort: one of slides, or of features.
        labels: see `parse_manifest`; "unused" compares none.

    Raises:
        ManifestError: see `require_patients`.
    """
    manifest = patients_of(cohort.manifest, labels=labels)
    numbers = {slide.slide_id: row for row, slide in enumerate(cohort.manifest.slides)}
    joined = tuple(
        JoinedGrid(cohort.parts([numbers[slide.slide_id] for slide in patient.slides])) for patient in manifest.slides
    )
    return replace(cohort, manifest=manifest, grids=joined)


def patients_of(manifest: Manifest, *, labels: str = "required") -> Manifest:
    """The manifest with an entry per patient; see `by_patient`."""
    require_patients(manifest, labels=labels)
    patients = tuple(_patient(slides) for slides in _slides_by_patient(manifest).values())
    return replace(manifest, slides=patients)


def require_patients(manifest: Manifest, *, labels: str = "required") -> None:
    """Refuse slides without a patient, and patients whose slides are answered differently: all of them at once.

    Raises:
        ManifestError: lists them.
    """
    problems = [
        f"patient_id must name the patient of a bag, got none (slide {slide_id}). HINT: fill the column patient_id in; "
        "where it is not known, the slide's own id makes it a patient of its own."
        for slide_id in manifest.without_patient
    ]
    by_id = _slides_by_patient(manifest)
    problems += [
        f"patient_id must be fit for a file name in bags of patients, got {patient!r}. HINT: letters, digits, blanks "
        "and ._-+=@() are; at most 200 bytes."
        for patient in by_id
        if not is_slide_id(patient)
    ]
    if labels != "unused":
        problems += _answer_problems(manifest, by_id)
    if problems:
        raise ManifestError(manifest.source, problems)


def _slides_by_patient(manifest: Manifest) -> dict[str, list[SlideEntry]]:
    """Patient -> slides, wherever they stand in the table."""
    slides: dict[str, list[SlideEntry]] = {}
    for slide in manifest.slides:
        slides.setdefault(slide.patient_id, []).append(slide)
    return slides


def _answer_problems(manifest: Manifest, by_id: Mapping[str, Sequence[SlideEntry]]) -> list[str]:
    what = ", ".join(manifest.columns.used)
    problems = []
    for patient, slides in by_id.items():
        by_answer: dict[str, list[str]] = {}
        for slide in slides:
            by_answer.setdefault(manifest.target_words(slide), []).append(slide.slide_id)
        if len(by_answer) > 1:
            got = " and ".join(f"{answer or 'none'} ({', '.join(ids)})" for answer, ids in by_answer.items())
            problems.append(
                f"{what} must be the same over a patient's slides in bags of patients, got {got} (patient {patient}). "
                "HINT: correct the rows."
            )
    return problems


def _patient(slides: Sequence[SlideEntry]) -> SlideEntry:
    members = tuple(sorted(slides, key=lambda slide: slide.slide_id))
    first = members[0]
    same = lambda values: first if len(set(values)) == 1 else None  # noqa: E731
    answered = same((slide.label, slide.target, slide.stratum) for slide in members)
    center = same(slide.center for slide in members)
    return SlideEntry(
        *(first.patient_id, first.path, None if answered is None else first.label, first.patient_id, first.split),
        center=None if center is None else first.center,
        target=() if answered is None else first.target,
        stratum=None if answered is None else first.stratum,
        members=members,
    )
