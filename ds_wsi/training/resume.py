"""A run's checkpoints: where it stands is saved, and a run that shares what decides its end goes on from there.

    model.safetensors              weights and buffers, by name          engines/full_state/engine_state.py
    optimizer.safetensors          the optimizer's state, by name        likewise
    weight_average.safetensors     with --ema_decay
    random-RANK-of-RANKS           a process's generators                random_state.py
    statistics-RANK-of-RANKS       running statistics that it tracks     own_statistics.py
    comm_hook-RANK-of-RANKS        what its hook owes                    engines/comm_hooks/state_files.py
    state.json                     where it stands, and of which run     same_run.py

What the model and the optimizer have learned is whole: any engine on any number of processes goes on from it.
"""

import json
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_wsi.engines.accelerator.engine import tracked_buffers
from ds_wsi.engines.full_state.engine_state import put_state, take_state
from ds_wsi.runtime.files import link_or_copy
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.tensor_file import of_rank, open_tensors
from ds_wsi.training import own_statistics
from ds_wsi.training.checkpoint import FORMAT, MODEL, PENDING_WEIGHTS, Contents, read_state, save_checkpoint
from ds_wsi.training.norm_plan import has_moving_norms
from ds_wsi.training.random_state import put_random, take_random
from ds_wsi.training.run import Run
from ds_wsi.training.same_run import fingerprint, require_same

OPTIMIZER, AVERAGE = "optimizer.safetensors", "weight_average.safetensors"
RANDOM, STATISTICS = "random", "statistics"  # a file per process


def resume(run: Run) -> None:
    """Continue from the checkpoint that `prepare_run` found, where there is one. Collective.

    Raises:
        ValueError: the checkpoint is of a run with other settings or other data; names every difference.
    """
    made_of, checkpoint = fingerprint(run), run.checkpoint
    if checkpoint is None:
        return
    require_same(made_of, checkpoint)  # before the engine reads its own files
    state = read_state(checkpoint)
    if state["progress"].get("pending"):
        with open_tensors(checkpoint / PENDING_WEIGHTS):
            pass  # the validation that reads it would not say what is wrong with it
    try:
        run.progress.put_back(state["progress"])
        run.clock.seconds_before, run.clock.starts = float(state["time"]["seconds"]), int(state["time"]["starts"]) + 1
        then, facts = int(state["processes"]), {"average_steps": 0} | state["facts"]
        facts = {name: facts[name] for name in ("optimizer", "loss_scale", "engine", "average_steps")}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"state.json of {checkpoint} must tell where the run stands, got {type(error).__name__}: {error}. "
            "HINT: an earlier checkpoint."
        ) from error
    _load(run, checkpoint, facts, then)
    if run.progress.pending and run.accelerator.is_main_process:
        link_or_copy(checkpoint / PENDING_WEIGHTS, run.output_dir / PENDING_WEIGHTS)
    run.accelerator.wait_for_everyone()
    logger.info("resumed from %s (epoch %d, step %d)", checkpoint, run.progress.epoch, run.progress.global_step)


def _load(run: Run, checkpoint: Path, facts: dict[str, Any], then: int) -> None:
    """Engine, average, hook and generators; `then` processes saved them."""
    accelerator, now = run.accelerator, run.accelerator.num_processes
    with open_tensors(checkpoint / MODEL) as weights, open_tensors(checkpoint / OPTIMIZER) as states:
        put_state(
            *(accelerator, run.module, run.optimizer, weights, states, facts),
            betas_move=bool(run.settings.optim.demon),
        )
    if run.average is not None:
        with open_tensors(checkpoint / AVERAGE) as averages:
            run.average.load(averages, facts["average_steps"])
    if run.comm is not None:
        run.comm.load(checkpoint)
    if then == now:
        with open_tensors(checkpoint / of_rank(RANDOM, accelerator.process_index, now)) as generators:
            put_random(generators, run.device)
        if tracked_buffers(accelerator, run.module):
            with open_tensors(checkpoint / of_rank(STATISTICS, accelerator.process_index, now)) as statistics:
                own_statistics.load(accelerator, run.module, statistics)
        return
    logger.info("saved by %d processes, gone on with by %d: the same steps, but for the order of sums", then, now)
    if has_moving_norms(run) and run.config.norm_training != "step":
        logger.warning(
            "BatchNorm's running statistics are tracked by each process, of the slides it saw: with another number of "
            "processes they differ from an uninterrupted run's. HINT: --norm_training frozen or step."
        )


def save(run: Run) -> None:
    """Have a checkpoint of where the run stands written: when this returns it is copied, and `run.saver` has it.

    Collective.

    Raises:
        Exception: an earlier checkpoint could not be written.
    """
    began = time.perf_counter()
    run.saver.make_room()
    try:
        statistics = own_statistics.pool(run.accelerator, run.module)
        contents = _contents(run, statistics)
        own_statistics.put_back(run.accelerator, run.module, statistics)
    except BaseException:
        run.saver.leave_room()
        raise
    pending = run.output_dir / PENDING_WEIGHTS if run.progress.pending else None
    save_checkpoint(
        *(run.saver, run.accelerator, run.output_dir, run.progress.global_step, contents),
        run.settings.run.save_total_limit,
        pending=pending,
        began=began,
        timeout_s=run.settings.run.ddp_timeout,
    )
    run.clock.saved = time.perf_counter()
    run.accelerator.log({"save/seconds_waited": run.clock.saved - began}, step=run.progress.global_step)


def _contents(run: Run, statistics: dict[str, Tensor]) -> Contents:
    """All of it, copied to the host, with this process's own running statistics. Collective."""
    accelerator = run.accelerator
    taken = take_state(accelerator, run.module, run.optimizer)
    facts = dict(taken.facts)
    shared = {MODEL: taken.weights, OPTIMIZER: taken.optimizer}
    if run.average is not None:
        shared[AVERAGE] = run.average.weights()
        facts["average_steps"] = run.average.steps
    world = accelerator.num_processes
    per_process = {of_rank(RANDOM, accelerator.process_index, world): take_random(run.device)}
    if statistics:
        per_process[of_rank(STATISTICS, accelerator.process_index, world)] = {
            name: value.cpu() for name, value in statistics.items()
        }
    if run.comm is not None:
        per_process |= run.comm.on_host()
    state = {
        "format": FORMAT,
        "progress": vars(run.progress),
        "fingerprint": fingerprint(run),
        "time": {"seconds": run.clock.seconds, "starts": run.clock.starts},
        "processes": world,
        "facts": facts,
    }
    # As text and back: the run goes on and changes what is in it.
    return Contents(json.loads(json.dumps(state)), shared if accelerator.is_main_process else {}, per_process)
