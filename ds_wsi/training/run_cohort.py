"""The cohort of a run: read or drawn, tiled by one process, the same on all."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ds_wsi.bags.cohort import Cohort, load_cohort, tile_manifest
from ds_wsi.bags.feature_cohort import load_feature_cohort
from ds_wsi.bags.manifest import Manifest
from ds_wsi.bags.patients import by_patient, require_patients
from ds_wsi.bags.relabel import with_positive
from ds_wsi.bags.same_files import require_files_apart
from ds_wsi.bags.scales import feature_scales, tile_scales
from ds_wsi.bags.slide_policy import SkippedSlide, SlidePolicy, write_skipped
from ds_wsi.bags.splits import assign_splits
from ds_wsi.bags.summary import log_cohort
from ds_wsi.engines.accelerator.engine import (
    Accelerator,
    broadcast_object_list,
)
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.progress import Progress as Bar
from ds_wsi.slides.demo import DEMOS, make_demo
from ds_wsi.targets.choices import CLASSIFICATION
from ds_wsi.training.settings import TrainSettings
from ds_wsi.training.task import require_split_targets, target_columns


def cohort_of(settings: TrainSettings, accelerator: Accelerator, output_dir: Path, write_grids: bool) -> Cohort:
    """The slides or features that a run trains on, with the positive class that its settings name. Collective."""
    cohort = _read_cohort(settings, accelerator, output_dir, write_grids)
    if settings.data.bag == "patient":
        cohort = by_patient(cohort)
        log_cohort(cohort.manifest, cohort.lengths)
    # After splits are drawn: those do not depend on it.
    manifest = with_positive(cohort.manifest, settings.data.positive_class)
    if manifest.kind == CLASSIFICATION and len(manifest.classes) == 2:
        logger.info("positive class, whose f1 is told: %s (--positive_class)", manifest.classes[1])
    return replace(cohort, manifest=manifest)


def _read_cohort(settings: TrainSettings, accelerator: Accelerator, output_dir: Path, write_grids: bool) -> Cohort:
    data, policies, columns = settings.data, settings.policies, target_columns(settings)

    def checked(manifest: Manifest) -> Manifest:
        with_positive(manifest, data.positive_class)  # told before slides are tiled
        if data.bag == "patient":
            require_patients(manifest)
        if manifest.kind != CLASSIFICATION:
            require_split_targets(assign_splits(manifest, seed=data.split_seed, tell=False))
        return manifest

    # The main process tiles and writes the grids, the others then read them.
    with accelerator.main_process_first():
        manifest = data.manifest or make_demo(data.demo_folder, DEMOS[data.demo]())
        if data.features_dir is not None:
            of_features = partial(
                load_feature_cohort,
                manifest,
                check=data.check_features,
                record_dir=data.tiles_dir or output_dir / "tiles",
                classes=data.classes,
                seed=data.split_seed,
                workers=max(1, policies.reading.workers),
                write_record=write_grids,
                choose=checked,
                columns=columns,
                memory_bytes=policies.reading.features_memory_bytes // max(1, len(data.mpps)),
            )
            of_files = feature_scales(of_features, data.features_dir, data.mpps)
            return replace(of_files, reader=policies.reading.slide_reader)  # of slides that are drawn

    def load(skipped: tuple[SkippedSlide, ...] | None) -> Cohort:
        shown = accelerator.is_main_process and not settings.run.disable_tqdm
        with Bar("opening and tiling", "slide", shown=shown) as bar:
            tiling: dict[str, Any] = {
                "slide_mpp": data.slide_mpp,
                "workers": max(1, policies.reading.workers),
                "write_grids": write_grids,
                "slides": SlidePolicy(
                    *(data.tissue_masks, data.masks_in_bounds, data.skip_bad_slides, skipped),
                    reader=policies.reading.slide_reader,
                ),
                "on_slide": bar.step,
            }
            table = {"classes": data.classes, "choose": checked, "columns": columns}
            return _tiled(settings, manifest, Path(data.tiles_dir or output_dir / "tiles"), table, tiling)

    # Which slides are left out is the main process's to say: another could find another file unreadable.
    cohort = load(None) if accelerator.is_main_process else None
    skipped = broadcast_object_list([None if cohort is None else cohort.skipped])[0]
    if cohort is None:
        return load(skipped)
    if write_grids:
        write_skipped(output_dir, cohort.skipped)
    return cohort


def _tiled(
    settings: TrainSettings, manifest: str | Path, folder: Path, table: dict[str, Any], tiling: dict[str, Any]
) -> Cohort:
    """The cohort of slides at all magnifications; `table` is how it is read, `tiling` how slides are tiled."""
    tilings, seed = settings.tilings, settings.data.split_seed
    several = len(tilings) > 1  # splits are then drawn of the slides that can be used at all of them
    cohort = load_cohort(manifest, tilings[0], tiles_dir=folder, seed=seed, need_splits=not several, **table, **tiling)
    if not several:
        return cohort
    tile = lambda some, policy, kept: tile_manifest(some, policy, tiles_dir=kept, **tiling)  # noqa: E731
    cohort = tile_scales(cohort, tilings, folder, tile)
    cohort = replace(cohort, manifest=assign_splits(cohort.manifest, seed=seed))
    require_files_apart(cohort.manifest)
    log_cohort(cohort.manifest, cohort.lengths)
    return cohort


def require_splits(cohort: Cohort) -> None:
    """Refuse a cohort that leaves nothing to train on or to test; tell one without validation."""
    for split in ("train", "test"):
        if not cohort.rows(split):
            raise ValueError(
                f"the {split} split must hold at least one slide, got none ({cohort.manifest.source}). "
                "HINT: give some slides this split, or leave the column out and splits are drawn by patient."
            )
    if not cohort.rows("validation"):
        logger.warning("no validation split: the last epoch's weights are exported")
