"""What the demo cohort "graded" holds beside classes: how much tumour a patient has, and the targets that follow.

Both slides of a patient hold as many foci, from none to three, whose nuclei are rings all or in part. The grade is the
number of foci; the score is the foci's share of rings, summed, with noise; the labels say whether the foci are several,
and whether their nuclei are rings all. The hazard of the event rises with the score without its noise; times are whole
months, so that some are equal, and some patients are censored before.
"""

import math
from typing import NamedTuple

import numpy as np

TARGETS_DEMO, TIME_UNIT = "graded", "months"
TARGET_FIELDS = ("grade", "score", "several_foci", "full_foci", "months", "event")
MOST_FOCI = 3
SOME_RINGS = 0.65  # share of the nuclei in foci that are not full
BASE_MONTHS, HAZARD_PER_SCORE, SHAPE = 60.0, 2.0, 3.0  # Weibull's: the hazard rises with time, by this shape
FOLLOW_UP_MONTHS = (18, 72)
SCORE_NOISE = 0.1
SCORE_GAP = 13  # every so many slides one has no score


class Findings(NamedTuple):
    """What the slides of a patient hold.

    Attributes:
        foci: how many.
        rings: share of their nuclei that are rings.
    """

    foci: int
    rings: float

    @property
    def burden(self) -> float:
        """The score without noise."""
        return self.foci * self.rings


def findings_of(number: int) -> Findings:
    """The findings of a patient of a split, by the number: every kind in turn."""
    return Findings(number % (MOST_FOCI + 1), SOME_RINGS if number // (MOST_FOCI + 1) % 2 else 1.0)


def targets_of(findings: Findings, seed: int, patient: str, index: int) -> dict[str, str]:
    """The cells of a slide's `TARGET_FIELDS`.

    Args:
        findings: the patient's.
        seed: the cohort's.
        patient: the patient's name, by which the follow-up is drawn: the same of all slides.
        index: the slide's number in the cohort.
    """
    of_patient = np.random.default_rng([seed, 41, *patient.encode()])
    drawn = of_patient.exponential() * math.exp(-HAZARD_PER_SCORE * findings.burden)
    months = math.ceil(BASE_MONTHS * drawn ** (1 / SHAPE))
    end = int(of_patient.integers(*FOLLOW_UP_MONTHS))
    score = findings.burden + np.random.default_rng([seed, 42, index]).normal(0, SCORE_NOISE)
    return {
        "grade": str(findings.foci),
        "score": "" if index % SCORE_GAP == SCORE_GAP - 1 else f"{score:.3f}",
        "several_foci": str(int(findings.foci > 1)),
        "full_foci": str(int(findings.foci > 0 and findings.rings == 1.0)),
        "months": str(min(months, end)),
        "event": str(int(months <= end)),
    }
