"""A run's checkpoints: where it stands is saved, and a run that shares what decides its end goes on from there."""

import time

from ds_wsi.engines.accelerate import average_buffers
from ds_wsi.runtime.files import link_or_copy
from ds_wsi.runtime.log import logger
from ds_wsi.training.checkpoint import PENDING_WEIGHTS, load_checkpoint, save_checkpoint
from ds_wsi.training.run import Progress, Run
from ds_wsi.training.same_run import fingerprint, require_same


def resume(run: Run) -> None:
    """Continue from the checkpoint that `prepare_run` found, where there is one. Collective.

    Raises:
        ValueError: the checkpoint is of a run with other settings or other data; names every difference.
    """
    ours, checkpoint = fingerprint(run), run.checkpoint
    if checkpoint is None:
        return
    require_same(ours, checkpoint)  # before the engine reads its own files
    state = load_checkpoint(run.accelerator, checkpoint, run.comm)
    run.progress = Progress(**state["progress"])
    earlier = state.get("time", {"seconds": 0.0, "starts": 1})  # earlier versions did not keep it
    run.seconds_before, run.starts = earlier["seconds"], earlier["starts"] + 1
    if run.progress.pending and run.accelerator.is_main_process:
        link_or_copy(checkpoint / PENDING_WEIGHTS, run.output_dir / PENDING_WEIGHTS)
    run.accelerator.wait_for_everyone()
    logger.info("resumed from %s (epoch %d, step %d)", checkpoint, run.progress.epoch, run.progress.global_step)


def save(run: Run) -> None:
    """Write a checkpoint of where the run stands. Collective."""
    average_buffers(run.accelerator, run.module)
    spent = {"seconds": run.seconds, "starts": run.starts}
    state = {"progress": vars(run.progress), "fingerprint": fingerprint(run), "time": spent}
    limit = run.settings.run.save_total_limit
    pending = run.output_dir / PENDING_WEIGHTS if run.progress.pending else None
    path = save_checkpoint(run.accelerator, run.output_dir, run.progress.global_step, state, limit, run.comm, pending)
    run.saved = time.perf_counter()
    logger.info("checkpoint: %s", path)
