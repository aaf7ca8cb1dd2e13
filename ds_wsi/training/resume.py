"""A run's checkpoints: where it stands is saved, and a run that shares what decides its end goes on from there."""

import json
from dataclasses import asdict
from typing import Any

from ds_wsi.bags.feature_cohort import features_digest
from ds_wsi.engines.accelerate import average_buffers, broadcast_object_list
from ds_wsi.runtime.files import link_or_copy
from ds_wsi.runtime.log import logger
from ds_wsi.training.checkpoint import (
    PENDING_WEIGHTS,
    find_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from ds_wsi.training.run import Progress, Run
from ds_wsi.training.stopping import stopping_words


def _fingerprint(run: Run) -> dict[str, Any]:
    """What a resumed run must share with the one it continues, to end with the same weights."""
    optim = run.settings.optim
    return {
        "seed": run.settings.run.seed,
        **run.epoch_layout,
        "stacking": json.loads(json.dumps(asdict(run.settings.policies.stacking))),
        "from_tile_store": bool(run.settings.policies.reading.tile_store),  # its JPEG differs by a grey level
        "tiles_per_slide": run.settings.policies.reading.tiles_per_slide,
        "num_train_epochs": optim.num_train_epochs,
        "learning_rate": optim.learning_rate,
        "lr_scheduler_type": optim.lr_scheduler_type,
        "warmup_steps": optim.warmup_steps,
        "mixed_precision": optim.mixed_precision,
        "optim": optim.optim,
        "momentum": optim.momentum,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "demon": optim.demon,
        "class_weights": None if optim.class_weights is None else list(optim.class_weights),
        "ema_decay": optim.ema_decay,
        "fsdp": run.accelerator.is_fsdp2,  # its checkpoints are other files
        # The hook that is in use, for "auto" may find another link.
        "comm_hook": None if run.comm is None else f"{run.comm.name}, keep {run.settings.policies.compression.keep:g}",
        **{
            name: getattr(run.settings.model, name)
            for name in ("freeze_encoder", "freeze_until", "freeze_encoder_epochs", "lora_rank", "lora_alpha")
        },
        "lora_targets": list(run.settings.model.lora_targets),
        "augment": asdict(run.settings.policies.augment),
        "encoder": run.config.encoder and run.settings.model.encoder,
        "dropout": run.config.dropout,
        "aggregator_options": run.config.aggregator_options,
        "norm_training": run.config.norm_training,
        **{f"norm.{name}": getattr(run.settings.policies.norm, name) for name in ("evaluation", "affine")},
        "metric_for_best_model": run.settings.run.metric_for_best_model,
        "encoder_learning_rate": optim.learning_rate * run.settings.encoder_factor,
        "eval_precision": run.settings.run.eval_precision,
        "encoder_features": run.config.encoder_features,
        "aggregator": run.config.aggregator,
        "features": None if run.cohort.in_dim is None else features_digest(run.cohort, run.cohort.rows("train")),
        "tiling": json.loads(json.dumps(run.config.tiling)),  # as the checkpoint's JSON has it: tuples are lists
        "early_stopping": stopping_words(run.settings.run),
        "training_slides": len(run.cohort.rows("train")),
        "training_tiles": sum(run.cohort.lengths[row] for row in run.cohort.rows("train")),
    }


def resume(run: Run) -> None:
    """Continue from the checkpoint that the settings ask for, where there is one. Collective.

    Raises:
        ValueError: the checkpoint is torn, or of a run with other settings; names the key.
    """
    wanted = run.settings.run.resume_from_checkpoint
    if wanted is None:
        return
    # Chosen by one process: another could find a checkpoint torn that this one has not finished reading.
    found = [find_checkpoint(run.output_dir, wanted) if run.accelerator.is_main_process else None]
    checkpoint = broadcast_object_list(found)[0]
    if checkpoint is None:
        return
    ours, theirs = _fingerprint(run), read_state(checkpoint)["fingerprint"]  # before the engine reads its own files
    # Of a checkpoint before there was a choice.
    theirs = {"momentum": 0.0, "eval_precision": "no", "encoder_learning_rate": theirs.get("learning_rate")} | theirs
    if "bn_population" in theirs:  # of a checkpoint before there was a policy: what it trained and exported then
        theirs = {"norm.evaluation": "running", "norm.affine": True, "norm_training": theirs["bn_population"]} | theirs
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise ValueError(
                f"{key} must be the checkpoint's, {theirs.get(key)}, to continue it exactly, got {value} "
                f"({checkpoint}). HINT: give the options of the first start, or another --output_dir."
            )
    state = load_checkpoint(run.accelerator, checkpoint, run.comm)
    run.progress = Progress(**state["progress"])
    if run.progress.pending and run.accelerator.is_main_process:
        link_or_copy(checkpoint / PENDING_WEIGHTS, run.output_dir / PENDING_WEIGHTS)
    run.accelerator.wait_for_everyone()
    logger.info("resumed from %s (epoch %d, step %d)", checkpoint, run.progress.epoch, run.progress.global_step)


def save(run: Run) -> None:
    """Write a checkpoint of where the run stands. Collective."""
    average_buffers(run.accelerator, run.module)
    state = {"progress": vars(run.progress), "fingerprint": _fingerprint(run)}
    limit = run.settings.run.save_total_limit
    pending = run.output_dir / PENDING_WEIGHTS if run.progress.pending else None
    save_checkpoint(run.accelerator, run.output_dir, run.progress.global_step, state, limit, run.comm, pending)
