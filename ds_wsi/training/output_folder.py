"""Where a run writes, and the checkpoint that it goes on from: the same on all ranks."""

import time
from pathlib import Path

from ds_wsi.engines.accelerator.engine import (
    Accelerator,
    broadcast_object_list,
)
from ds_wsi.training.checkpoint import find_checkpoint
from ds_wsi.training.run_folder import begin, require_run_folder
from ds_wsi.training.settings import TrainSettings


def asked_folder(settings: TrainSettings) -> Path | None:
    """The run's folder as given, or the parent of the checkpoint to go on from; None: a new one.

    Raises:
        ValueError: a run is to be gone on with, and none is named.
    """
    run = settings.run
    if run.output_dir:
        return Path(run.output_dir)
    if run.resume_from_checkpoint == "latest":
        raise ValueError("--resume_from_checkpoint without a path needs --output_dir, the folder of the run, got none")
    return None if run.resume_from_checkpoint is None else Path(run.resume_from_checkpoint).parent


def output_folder(settings: TrainSettings, accelerator: Accelerator) -> Path:
    """The run's folder, the same on every rank: as given, a checkpoint's parent, or a new one named by the time."""
    run = settings.run
    asked = asked_folder(settings)
    path = asked or Path(broadcast_object_list([f"runs/{time.strftime('%Y%m%d-%H%M%S')}"])[0])
    require_run_folder(path, resumes=run.resume_from_checkpoint is not None)
    # Before any rank writes to it, because the checks above must see the same folder on every rank.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        begin(path)
    return path


def checkpoint_of(settings: TrainSettings, accelerator: Accelerator, output_dir: Path) -> Path | None:
    """The checkpoint that the settings ask for, where there is one. Collective."""
    asked = settings.run.resume_from_checkpoint
    if asked is None:
        return None
    # Chosen by one process: another could find a checkpoint torn that this one has not finished reading.
    answer = [find_checkpoint(output_dir, asked) if accelerator.is_main_process else None]
    chosen: Path | None = broadcast_object_list(answer)[0]
    return chosen
