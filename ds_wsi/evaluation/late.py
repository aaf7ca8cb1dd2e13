"""Late pooling: what a model of slides says of a patient is made of its outputs for the patient's slides."""

from collections.abc import Sequence

import torch

from ds_wsi.bags.cohort import Cohort
from ds_wsi.bags.patients import by_patient
from ds_wsi.evaluation.predict import SlidePrediction

HOW = ("none", "mean", "max")


def pooled_by_patient(
    cohort: Cohort, predictions: Sequence[SlidePrediction], how: str
) -> tuple[Cohort, list[SlidePrediction]]:
    """Patients in the place of slides: the outputs (logits) of a patient's slides, pooled run by run.

    Args:
        cohort: the slides, all of which are predicted.
        predictions: one per slide, in any order.
        how: "mean" of the outputs, or "max", the largest of each.

    Returns:
        The cohort of patients, and one prediction per patient, in its order: without attention, which is each slide's
        own; its `kept` counts the slides' tiles.

    Raises:
        ManifestError: slides without a patient, or patients whose slides have different answers.
    """
    assert how in HOW[1:]
    patients = by_patient(cohort)
    of_slide = {prediction.slide: prediction for prediction in predictions}
    pooled = []
    for row in range(len(patients.grids)):
        numbers = dict.fromkeys(part.number for part in patients.parts([row]))  # once, at several magnifications too
        slides = [of_slide[number] for number in numbers]
        outputs = torch.stack([slide.run_logits for slide in slides])  # [slides, R, C]
        logits = outputs.mean(0) if how == "mean" else outputs.amax(0)
        pooled.append(SlidePrediction(row, logits, None, torch.cat([slide.kept for slide in slides])))
    return patients, pooled
