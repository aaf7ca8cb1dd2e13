"""Splits by patient: all slides of a patient on one side. Drawn once, many times, in folds; or a part held out."""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace

from ds_wsi.bags.manifest import SPLITS, Manifest, ManifestError
from ds_wsi.bags.target_columns import draw_strata
from ds_wsi.bags.target_parts import targets_apart
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.words import counted
from ds_wsi.targets.choices import CLASSIFICATION, SEVERAL

LEVELS = ("patient", "slide")


def assign_splits(
    manifest: Manifest, fractions: tuple[float, float, float] = (0.6, 0.2, 0.2), seed: int = 0, *, tell: bool = True
) -> Manifest:
    """Keep the manifest's own splits; where it has none, draw train, validation and test by patient.

    Patients are stratified by their most frequent label and drawn with `seed`; within a label each goes to the split
    that is furthest below its share. With `tell` the draw is logged.

    Raises:
        ManifestError: too few patients to give every split one.
    """
    if manifest.slides[0].split is not None:
        return manifest
    split_of = _draw(manifest, dict(zip(SPLITS, fractions, strict=True)), str(seed))
    if tell:
        counts = Counter(split_of.values())
        words = ", ".join(f"{split} {counts[split]}" for split in SPLITS if counts[split])
        logger.info("splits drawn by patient with seed %d: patients in %s", seed, words)
    return _with_splits(manifest, split_of)


def monte_carlo_splits(
    manifest: Manifest,
    runs: int,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    level: str = "patient",
) -> tuple[Manifest, ...]:
    """The cohort with train, validation and test drawn anew for each of `runs` runs, stratified by label.

    Args:
        manifest: the slides; their own splits are put aside.
        runs: how many draws; a draw does not depend on how many others there are.
        fractions: the shares of train, validation, test; 0 leaves a split empty.
        seed: the seed of all draws.
        level: "patient", or "slide" as some papers split, see `slides_as_patients`.

    Raises:
        ManifestError: too few patients to give every split one.
        ValueError: fewer than one run.
    """
    if runs < 1:
        raise ValueError(f"monte_carlo_runs must be at least 1, got {runs}")
    manifest = at_level(manifest, level)
    shares = {split: share for split, share in zip(SPLITS, fractions, strict=True) if share > 0}
    return tuple(_with_splits(manifest, _draw(manifest, shares, f"{seed}-run{run}")) for run in range(runs))


def fold_splits(
    manifest: Manifest, folds: int, validation_fraction: float = 0.1, seed: int = 0, level: str = "patient"
) -> tuple[Manifest, ...]:
    """The cohort `folds` times over, each patient in the test split of exactly one, stratified by label.

    Args:
        manifest: the slides; their own splits are put aside.
        folds: how many, at least 2.
        validation_fraction: the share of the patients that are not tested; 0 leaves validation out.
        seed: the seed of all draws.
        level: see `monte_carlo_splits`.

    Raises:
        ManifestError: fewer patients than folds.
    """
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}. HINT: --monte_carlo_runs draws a single one.")
    manifest = at_level(manifest, level)
    fold_of = _draw(manifest, {str(fold): 1 / folds for fold in range(folds)}, f"{seed}-folds")
    drawn = []
    for fold in range(folds):
        split_of = {patient: "test" if test_fold == str(fold) else "train" for patient, test_fold in fold_of.items()}
        drawn.append(hold_out_validation(_with_splits(manifest, split_of), validation_fraction, seed))
    return tuple(drawn)


def hold_out_validation(manifest: Manifest, fraction: float, seed: int = 0) -> Manifest:
    """Move a fraction of the training patients, stratified by label, to validation; 0 returns the manifest.

    Raises:
        ManifestError: no training split, or too few training patients to give both one.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"validation fraction must be in [0, 1), got {fraction}. HINT: 0.1 holds out a tenth.")
    if fraction == 0:
        return manifest
    training = replace(manifest, slides=manifest.in_split("train"))
    if not training.slides:
        problem = f"validation must be held out of a training split, got none among {len(manifest.slides)} slides"
        raise ManifestError(manifest.source, [f"{problem}. HINT: draw splits, by folds or runs."])
    drawn = _draw(training, {"train": 1 - fraction, "validation": fraction}, f"{seed}-validation")
    slides = [
        replace(slide, split=drawn[slide.patient_id]) if slide.split == "train" else slide for slide in manifest.slides
    ]
    return replace(manifest, slides=tuple(slides))


def at_level(manifest: Manifest, level: str) -> Manifest:
    """The manifest to split at a level: as it is for "patient", see `slides_as_patients` for "slide"."""
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}. HINT: patient is the safe one.")
    return manifest if level == "patient" else slides_as_patients(manifest)


def slides_as_patients(manifest: Manifest) -> Manifest:
    """Make each slide a patient of its own, as papers that split by slide do; warns of the leakage."""
    counts = Counter(slide.patient_id for slide in manifest.slides)
    several = [patient for patient, count in counts.items() if count > 1]
    if several:
        logger.warning(
            "split by slide: the slides of %d patients (%s ...) can be in training and in test, so that results are "
            "too good for patients that were never seen",
            *(len(several), several[0]),
        )
    return replace(manifest, slides=tuple(replace(slide, patient_id=slide.slide_id) for slide in manifest.slides))


def _with_splits(manifest: Manifest, split_of: Mapping[str, str]) -> Manifest:
    slides = tuple(replace(slide, split=split_of[slide.patient_id]) for slide in manifest.slides)
    return replace(manifest, slides=slides)


def _draw(manifest: Manifest, shares: Mapping[str, float], seed: str) -> dict[str, str]:
    """Patient -> part: within a label each goes to the part that is furthest below its share.

    Raises:
        ManifestError: a part gets no patient.
    """
    strata: dict[int, list[str]] = defaultdict(list)
    for patient, labels in _labels_by_patient(manifest).items():
        # A tie goes to the lower label: the splits do not depend on the order of the rows.
        strata[min(labels, key=lambda label: (-labels[label], label))].append(patient)
    part_of: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for label in sorted(strata):
        patients = sorted(strata[label])
        random.Random(f"{seed}-{label}").shuffle(patients)
        taken: Counter[str] = Counter()
        for patient in patients:
            # The overall count breaks ties, so that small strata do not all fill the same part.
            part = min(shares, key=lambda name: ((taken[name] + 1) / shares[name], counts[name] / shares[name]))
            taken[part] += 1
            counts[part] += 1
            part_of[patient] = part
    empty = [part for part in shares if not counts[part]]
    if empty:
        raise ManifestError(
            manifest.source,
            [
                f"{len(shares)} splits need at least one patient each, got none for {', '.join(empty[:3])}"
                f"{', ...' if len(empty) > 3 else ''} out of {counted(len(part_of), 'patient')}. "
                "HINT: add a `split` column to the manifest, or draw fewer parts."
            ],
        )
    return part_of


def _labels_by_patient(manifest: Manifest) -> dict[str, Counter[int]]:
    labels: dict[str, Counter[int]] = defaultdict(Counter)
    for slide, stratum in zip(manifest.slides, _strata(manifest), strict=True):
        labels[slide.patient_id][stratum] += 1
    return labels


def _strata(manifest: Manifest) -> list[int]:
    """The stratum of each slide in a draw, of several targets by the first; those without a label are one."""
    slides = manifest.slides
    if manifest.kind == CLASSIFICATION:
        return [-1 if slide.label is None else slide.label for slide in slides]
    if manifest.kind == SEVERAL:
        return _strata(targets_apart(manifest)[0])
    return draw_strata(manifest.kind, [slide.target for slide in slides], [slide.patient_id for slide in slides])
