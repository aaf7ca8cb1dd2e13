"""Splits by patient: all slides of a patient on one side."""

import random
from collections import Counter, defaultdict
from dataclasses import replace

from ds_wsi.bags.manifest import SPLITS, Manifest, ManifestError
from ds_wsi.runtime.log import logger


def assign_splits(
    manifest: Manifest, fractions: tuple[float, float, float] = (0.6, 0.2, 0.2), seed: int = 0
) -> Manifest:
    """Keep the manifest's own splits; where it has none, draw train, validation and test by patient.

    Patients are stratified by their most frequent label and drawn with `seed`; within a label each goes to the split
    that is furthest below its share.

    Raises:
        ManifestError: too few patients to give every split one.
    """
    if manifest.slides[0].split is not None:
        return manifest
    strata: dict[int, list[str]] = defaultdict(list)
    for patient, labels in _labels_by_patient(manifest).items():
        # A tie goes to the lower label: the splits do not depend on the order of the rows.
        strata[min(labels, key=lambda label: (-labels[label], label))].append(patient)
    split_of: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for label in sorted(strata):
        patients = sorted(strata[label])
        random.Random(f"{seed}-{label}").shuffle(patients)
        taken: Counter[str] = Counter()
        for patient in patients:
            # The overall count breaks ties, so that small strata do not all fill the same split.
            split = min(
                SPLITS,
                key=lambda name: (
                    (taken[name] + 1) / fractions[SPLITS.index(name)],
                    counts[name] / fractions[SPLITS.index(name)],
                ),
            )
            taken[split] += 1
            counts[split] += 1
            split_of[patient] = split
    empty = [split for split in SPLITS if not counts[split]]
    if empty:
        raise ManifestError(
            manifest.source,
            [
                f"splits need at least one patient each, got none for {', '.join(empty)} out of "
                f"{len(split_of)} patient(s). HINT: add a `split` column to the manifest."
            ],
        )
    logger.info("splits drawn by patient with seed %d: %s patients", seed, dict(counts))
    slides = tuple(replace(slide, split=split_of[slide.patient_id]) for slide in manifest.slides)
    return replace(manifest, slides=slides)


def _labels_by_patient(manifest: Manifest) -> dict[str, Counter[int]]:
    labels: dict[str, Counter[int]] = defaultdict(Counter)
    for slide in manifest.slides:
        labels[slide.patient_id][slide.label] += 1
    return labels
