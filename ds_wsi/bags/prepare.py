"""Manifests for training, made from a public dataset's folder: read it, split it, write one CSV per split."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_wsi.bags.datasets import DATASETS
from ds_wsi.bags.manifest import Manifest, write_manifest
from ds_wsi.bags.published import apply_split, find_folds
from ds_wsi.bags.relabel import map_labels
from ds_wsi.bags.splits import at_level, fold_splits, hold_out_validation, monte_carlo_splits
from ds_wsi.runtime.own_files import begins_with, require_ours

MANIFEST_HEAD = "slide_id,path,label,patient_id,split,mpp,center"  # with which `write_manifest` begins


def read_dataset(dataset: str, root: str | Path, reading: Mapping[str, Any]) -> Manifest:
    """Read a dataset with those of the reader's options that are given.

    Raises:
        ManifestError: lists every problem of the dataset at once.
        ValueError: an option that this dataset's reader has not.
    """
    reader = DATASETS[dataset]
    known = list(inspect.signature(reader).parameters)[1:]
    unknown = [name for name in reading if name not in known]
    if unknown:
        raise ValueError(f"options of {dataset} must be of {', '.join(known)}, got {unknown[0]}. HINT: leave it out.")
    return reader(root, **reading)


def split_dataset(
    manifest: Manifest,
    *,
    split: str | Path | None = None,
    folds: int = 0,
    runs: int = 0,
    level: str = "patient",
    keep_listed: bool = False,
    validation_fraction: float = 0.0,
    seed: int = 0,
) -> tuple[Manifest, ...]:
    """One manifest per split: published (a file, or a folder of folds), drawn in folds or runs, or the dataset's own.

    Args:
        manifest: the dataset's.
        split: see `apply_split`; a folder of folds gives one manifest per fold.
        folds, runs: see `fold_splits` and `monte_carlo_splits`.
        level: "patient" or "slide": what is drawn, or what a published split keeps apart.
        keep_listed: see `apply_split`.
        validation_fraction: the share of the training patients that is held out: of folds, of the dataset's own
            split, and of a published split without validation.
        seed: the seed of what is drawn.

    Raises:
        ValueError: more than one of split, folds and runs, or what has no effect on the one that is given.
    """
    if sum(map(bool, (split, folds, runs))) > 1:
        raise ValueError(
            "at most one of --split_file, --folds and --monte_carlo_runs must be given, got several. HINT: choose one."
        )
    if keep_listed and not split:
        raise ValueError("--keep_listed must be given with --split_file, got none. HINT: leave it out.")
    if runs and validation_fraction:
        raise ValueError(
            f"--validation_fraction must not be given with --monte_carlo_runs, got {validation_fraction}: a tenth of "
            "the patients of each draw validates. HINT: leave it out."
        )
    if split:
        published = (apply_split(manifest, path, level=level, keep_listed=keep_listed) for path in _published(split))
        return tuple(_with_validation(each, validation_fraction, seed) for each in published)
    if folds:
        return fold_splits(manifest, folds, validation_fraction, seed, level)
    if runs:
        return monte_carlo_splits(manifest, runs, seed=seed, level=level)
    return (hold_out_validation(at_level(manifest, level), validation_fraction, seed),)


def _with_validation(manifest: Manifest, fraction: float, seed: int) -> Manifest:
    if fraction and manifest.in_split("validation"):
        raise ValueError(
            f"--validation_fraction must not be given with a split that has validation, got {fraction} "
            f"({manifest.source}). HINT: leave it out."
        )
    return hold_out_validation(manifest, fraction, seed)


def _published(split: str | Path) -> Sequence[Path]:
    path = Path(split)
    return find_folds(path) if path.is_dir() and not (path / "train.csv").exists() else (path,)


def write_manifests(manifests: Sequence[Manifest], path: str | Path) -> tuple[Path, ...]:
    """Write a single manifest to `path`, several to it with _0, _1, ... before the suffix.

    Raises:
        ValueError: a file that `write_manifest` did not write has one of the names.
    """
    path = Path(path)
    several = [path.with_name(f"{path.stem}_{number}{path.suffix}") for number in range(len(manifests))]
    paths = several if len(manifests) > 1 else [path]
    for place in paths:
        require_own_manifest(place)
    for manifest, place in zip(manifests, paths, strict=True):
        write_manifest(manifest, place)
    return tuple(paths)


def require_own_manifest(path: str | Path) -> None:
    """Refuse to write a manifest over another table, such as the label file that it is made of.

    Raises:
        ValueError: a file that `write_manifest` did not write has the name.
    """
    require_ours(Path(path), lambda place: begins_with(place, MANIFEST_HEAD), "the manifest's name")


def write_external(
    path: str | Path,
    dataset: str,
    root: str | Path,
    reading: Mapping[str, Any],
    classes: Sequence[str],
    mapping: Mapping[str, str] | None = None,
) -> None:
    """Write the manifest of an external set in a model's classes, to test the model on it.

    Args:
        path: where the CSV is written.
        dataset, root, reading: see `read_dataset`.
        classes, mapping: see `map_labels`.

    Raises:
        ManifestError: lists every problem of the dataset at once.
        ValueError: the classes disagree; names both. Or a file that `write_manifest` did not write has the name.
    """
    require_own_manifest(path)
    write_manifest(map_labels(read_dataset(dataset, root, reading), classes, mapping), path)
