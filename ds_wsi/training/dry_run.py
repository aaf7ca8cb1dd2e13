"""A run told before it is made: its cohort, settings, steps and, from two timed micro-steps, its time."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ds_wsi.bags.cohort import Cohort
from ds_wsi.bags.manifest import SPLITS, write_manifest
from ds_wsi.bags.same_files import fingerprint_of
from ds_wsi.bags.slide_entry import slides_of_rows
from ds_wsi.engines.accelerator.engine import gather_object
from ds_wsi.engines.accelerator.scope import Processes, closing_trackers, launched
from ds_wsi.norms import batch_norms
from ds_wsi.norms.policy import POPULATIONS
from ds_wsi.partition import PartitionPlan
from ds_wsi.partition.forward import PartitionedForward
from ds_wsi.runtime.progress import duration
from ds_wsi.runtime.words import counted
from ds_wsi.slides.coords import write_grid
from ds_wsi.slides.demo import DEMOS, is_drawn
from ds_wsi.training.changed import all_settings, changed_settings, setting_name
from ds_wsi.training.checkpoint import find_checkpoint
from ds_wsi.training.context import RunContext
from ds_wsi.training.epoch_plan import count_steps
from ds_wsi.training.norm_plan import norm_plan
from ds_wsi.training.one_step import TimedSteps, time_micro_steps
from ds_wsi.training.output_folder import asked_folder
from ds_wsi.training.prepare import engine_settings, prepare_run
from ds_wsi.training.protocol import Protocol, plan_runs, read_cohort, split_cohort
from ds_wsi.training.run_folder import require_run_folder
from ds_wsi.training.same_run import known_early, require_same
from ds_wsi.training.settings import TrainSettings

# Of a training step's time: a backward is about two forwards.
FORWARD_SHARE = 1 / 3


def dry_run(
    settings: TrainSettings, deepspeed_config: dict[str, Any] | None = None, *, all_of_them: bool = False
) -> str:
    """Check everything about a run, take two micro-steps of it, and tell what it would be. Collective.

    Nothing is written: grids of --tiles_dir are read where they fit, and others are tiled for this call alone.

    Args:
        settings: the run's.
        deepspeed_config: the DeepSpeed JSON, or None.
        all_of_them: tell the settings that are the defaults, too.

    Returns:
        The text, on the main process; elsewhere an empty string.

    Raises:
        ManifestError: lists everything that is wrong with the cohort.
        ValueError: settings that contradict each other.
    """
    with launched(engine_settings(settings), deepspeed_config) as processes, _scratch(processes) as folder:
        _require_place(settings, processes.world_size)
        scratch_settings = settings
        if settings.data.manifest is None and not is_drawn(settings.data.demo_folder, DEMOS[settings.data.demo]()):
            scratch_settings = replace(settings, data=replace(settings.data, demo_dir=str(folder / "demo")))
        return _dry_run(scratch_settings, settings, deepspeed_config, folder, all_of_them)


def dry_protocol(
    protocol: Protocol,
    settings: TrainSettings,
    deepspeed_config: dict[str, Any] | None = None,
    *,
    all_of_them: bool = False,
) -> str:
    """Do as `dry_run` does, for a protocol: check and count all its splits, and time its first run. Collective."""
    with launched(engine_settings(settings), deepspeed_config) as processes, _scratch(processes) as folder:
        tiles_dir = folder / "tiles"

        def prepare() -> tuple[dict[str, str], tuple[str, ...]]:
            given = None if settings.data.tiles_dir is None else Path(settings.data.tiles_dir)
            whole = read_cohort(protocol, settings, given, write_grids=False)
            for entry, grid in zip(whole.manifest.slides, whole.tile_grids, strict=True):
                write_grid(grid, tiles_dir / f"{grid.slide_id}.safetensors", fingerprint_of(entry))
            splits = split_cohort(protocol, whole)
            first = next(iter(splits.values()))
            write_manifest(first.manifest, folder / "cohort.csv")
            return {name: count_slides(cohort) for name, cohort in splits.items()}, first.manifest.classes

        counts, classes = processes.on_main(prepare)
        runs = plan_runs(protocol, tuple(counts))
        data = replace(settings.data, manifest=str(folder / "cohort.csv"), classes=classes, tiles_dir=str(tiles_dir))
        scratch_settings = replace(settings, data=data, run=replace(settings.run, seed=runs[0].seed))
        text = _dry_run(scratch_settings, settings, deepspeed_config, folder, all_of_them)
        if not processes.is_main:
            return ""
        lines = [f"protocol: preset {protocol.preset}, {len(runs)} runs, one after the other:"]
        lines += [f"  {', '.join(run.name for run in runs)}"]
        lines += [f"split {name}:\n{table}" for name, table in counts.items()]
        return "\n".join([*lines, f"each run, as {runs[0].name}:", text])


def _require_place(settings: TrainSettings, world_size: int) -> None:
    """Refuse, as the run itself would, its folder and the checkpoint that it is to go on from."""
    folder, asked = asked_folder(settings), settings.run.resume_from_checkpoint
    if folder is None:
        return
    require_run_folder(folder, resumes=asked is not None)
    checkpoint = None if asked is None else find_checkpoint(folder, asked)
    if checkpoint is not None:
        require_same(known_early(settings, world_size), checkpoint)


@contextmanager
def _scratch(processes: Processes) -> Iterator[Path]:
    """A folder that all processes use and the main one deletes; of several machines, below a TMPDIR they share."""
    folder = Path(processes.on_main(lambda: tempfile.mkdtemp(prefix="ds_wsi-dry-run-")))
    try:
        yield folder
    finally:
        if processes.is_main:
            shutil.rmtree(folder)


def _dry_run(
    settings: TrainSettings,
    shown: TrainSettings,
    deepspeed_config: dict[str, Any] | None,
    folder: Path,
    all_of_them: bool,
) -> str:
    """What `dry_run` tells of `settings`, whose paths can be the scratch folder's; `shown` are the user's."""
    run_settings = replace(settings.run, output_dir=str(folder / "run"), resume_from_checkpoint=None)
    run = prepare_run(replace(settings, run=run_settings), deepspeed_config, write_grids=False)
    with closing_trackers(run.accelerator):
        measured = [time_micro_steps(run)]
        if run.accelerator.num_processes > 1:
            measured = gather_object(measured)
        text = _describe(run, shown, measured, all_of_them) if run.accelerator.is_main_process else ""
    run.accelerator.free_memory()
    return text


def count_slides(cohort: Cohort) -> str:
    """A line per split: its slides, tiles, patients and classes."""
    lines = []
    for split in SPLITS:
        rows = cohort.rows(split)
        slides = [cohort.manifest.slides[row] for row in rows]
        if not slides:
            lines.append(f"  {split}: no slides")
            continue
        lengths = [cohort.lengths[row] for row in rows]
        labels = [sum(slide.label == label for slide in slides) for label in range(len(cohort.manifest.classes))]
        classes = ", ".join(f"{name} {count}" for name, count in zip(cohort.manifest.classes, labels, strict=True))
        lines.append(
            f"  {split}: {counted(len(slides_of_rows(slides)), 'slide')} of "
            f"{counted(len({slide.patient_id for slide in slides}), 'patient')} ({classes}), "
            f"{sum(lengths)} tiles, {min(lengths)} to {max(lengths)} per "
            f"{'patient' if any(slide.members for slide in slides) else 'slide'}"
        )
    return "\n".join(lines)


def _describe(run: RunContext, settings: TrainSettings, measured: Sequence[TimedSteps], all_of_them: bool) -> str:
    an_epoch, total = count_steps(run)
    processes = run.accelerator.num_processes
    return "\n".join(
        [
            *_settings_lines(settings, all_of_them),
            *_norm_lines(run),
            "slides:",
            count_slides(run.cohort),
            _partition_words(run),
            f"steps: {an_epoch} per epoch, {total} in {counted(settings.optim.num_train_epochs, 'epoch')}, "
            f"{counted(processes, 'process')}",
            *_time_lines(run, measured),
        ]
    )


def _settings_lines(settings: TrainSettings, all_of_them: bool) -> list[str]:
    """Those that were changed, then, marked as defaults, the others or how they are told."""
    values, changed = all_settings(settings), changed_settings(settings)
    lines = ["settings that differ from the defaults:", *(f"  * {name} {value}" for name, value in changed.items())]
    if not changed:
        lines.append("  none")
    # What BatchNorm averages over is told below, as the run trains with it.
    others = [
        f"  {setting_name(field_path)} {value}"
        for field_path, value in values.items()
        if setting_name(field_path) not in changed and field_path != "policies.partition.bn_population"
    ]
    if all_of_them:
        return [*lines, "settings that are the defaults:", *others]
    return [*lines, f"settings that are the defaults: {len(others)} more (--dry_run all)"]


def _norm_lines(run: RunContext) -> list[str]:
    if not batch_norms(run.module.encoder):
        return []
    training = run.config.norm_training
    return [f"norms: BatchNorm averages over {POPULATIONS[training]} in training (norm.training {training})"]


def _partition_words(run: RunContext) -> str:
    if run.module.encoder_is_frozen:
        return "partition: none is needed, the frozen encoder keeps no activations"
    forward = run.module.encoder.__dict__.get("forward")
    if not isinstance(forward, PartitionedForward):
        return "partition: none (--partition)"
    plans = [forward.plan_or_policy] if isinstance(forward.plan_or_policy, PartitionPlan) else forward.plans
    longest = max(plans, key=lambda plan: plan.input_shape[0])
    return str(longest)


def _time_lines(run: RunContext, measured: Sequence[TimedSteps]) -> list[str]:
    """The slowest process decides; the second micro-step counts, because the first warms up."""
    steps = [step for step in measured if all(step.tiles)]
    if not steps:
        return ["time: no process had two bags to measure with"]
    cohort, reading = run.cohort, run.reading
    compute = max(step.compute_s[1] / step.tiles[1] for step in steps)
    read = max(sum(step.read_s) / sum(step.tiles) for step in steps)
    epochs, processes = run.epochs, run.accelerator.num_processes
    forward = compute * (1 if run.module.encoder_is_frozen else FORWARD_SHARE)
    training = sum(run.training_tiles) / run.mesh.slide_size
    evaluated = {split: sum(cohort.lengths[row] for row in cohort.rows(split)) for split in ("validation", "test")}

    def seconds(tiles: float, computing: float) -> float:
        # Workers read while the device computes.
        reads = tiles * read / max(1, reading.workers)
        return max(tiles * computing, reads) if reading.workers else tiles * computing + reads

    epoch_s = seconds(training, compute)
    # Each candidate of the norms' evaluation is an encoding, of tiles that are read once.
    validation_s = seconds(evaluated["validation"] / processes, forward * len(norm_plan(run).candidates))
    test_s = seconds(evaluated["test"] / processes, forward)
    total_s = epochs * (epoch_s + validation_s) + test_s
    timed = "; ".join(
        f"{tiles} tiles read in {read_s:.3g} s, computed in {compute_s:.3g} s"
        for tiles, read_s, compute_s in zip(steps[0].tiles, steps[0].read_s, steps[0].compute_s, strict=True)
    )
    return [
        f"two micro-steps: {timed}",
        f"time, an estimate from them: {duration(total_s, 1)} ({duration(epoch_s, 1)} of training and "
        f"{duration(validation_s, 1)} of validation per epoch, {duration(test_s, 1)} of test), without tiling, "
        "checkpoints and heat maps",
    ]
