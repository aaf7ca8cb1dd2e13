"""How a run is prepared: engine, folder, cohort, model, forwards, optimizer, in this order."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ds_wsi.bags.bag import FailureLog
from ds_wsi.bags.cohort import Cohort
from ds_wsi.bags.packing import require_store
from ds_wsi.bags.run_splits import write_splits
from ds_wsi.engines.accelerator.engine import (
    Accelerator,
    EngineSettings,
    attach_hook,
    build_accelerator,
    prepare,
)
from ds_wsi.engines.accelerator.pull import pull_to_start
from ds_wsi.engines.policies.norms import (
    decide_training,
    partition_population,
    warn_of_few_bags,
)
from ds_wsi.engines.sharded.zero import is_zero3
from ds_wsi.models import ModelConfig, SlideModel
from ds_wsi.norms import batch_norms
from ds_wsi.runtime.choices import precision_words
from ds_wsi.runtime.contracts import TakesHostTiles
from ds_wsi.runtime.log import logger
from ds_wsi.stacking.host_tiles import HostStacks
from ds_wsi.training.cox_pass import require_cox_steps
from ds_wsi.training.features import check_feature_settings
from ds_wsi.training.forwards import choose_kernels, replace_forwards
from ds_wsi.training.model import build_slide_model, check_encoder
from ds_wsi.training.norm_plan import bags_of_population
from ds_wsi.training.optim import WeightAverage, set_beta
from ds_wsi.training.output_folder import checkpoint_of, output_folder
from ds_wsi.training.parameter_groups import ENCODER, parameter_groups, words_of
from ds_wsi.training.run import Run
from ds_wsi.training.run_cohort import cohort_of, require_splits
from ds_wsi.training.same_run import known_early, require_same
from ds_wsi.training.saver import Saver
from ds_wsi.training.settings import TrainSettings
from ds_wsi.training.stopping import require_metric
from ds_wsi.training.task import require_task_settings, task_config
from ds_wsi.training.teacher import Teacher, open_teacher, require_teachable


def prepare_run(
    settings: TrainSettings,
    deepspeed_config: dict[str, Any] | None,
    *,
    on_folder: Callable[[Path], object] | None = None,
    on_connected: Callable[[], object] = lambda: None,
    write_grids: bool = True,
) -> Run:
    """Start the engine, check the cohort, build and wrap the model. Collective.

    Args:
        settings: the run's.
        deepspeed_config: the DeepSpeed JSON, or None for DDP or one process.
        on_folder: called on the main process with the run's folder as soon as it is there.
        on_connected: called on every process once they can reach each other, before anything is prepared.
        write_grids: False writes nothing to the folder of the grids, see `load_cohort`.

    Raises:
        ManifestError: lists everything that is wrong with the cohort.
        ValueError: settings that contradict each other.
    """
    _require_settings(settings)
    engine = engine_settings(settings)
    accelerator = build_accelerator(engine, Path(settings.run.output_dir or "runs"), deepspeed_config)
    on_connected()
    _require_engine(settings, accelerator)
    output_dir, checkpoint = _opened(settings, accelerator, on_folder)
    cohort = _checked_cohort(settings, accelerator, output_dir, write_grids)
    config, module, teacher = _built(settings, accelerator, cohort)
    training = decide_training(settings.policies.norm, partition_population(settings.policies.partition), module)
    choose_kernels(module, settings, cohort, accelerator)  # before anything is shared: a trial is each rank's own
    mesh, sharing = replace_forwards(module, settings, cohort, accelerator, training)
    model, optimizer = _prepared(accelerator, module, settings, engine)
    _tell_evaluation(settings, cohort)
    comm = attach_hook(accelerator, model, settings.policies.compression)
    accelerator.init_trackers("tensorboard", config=_flat(settings))
    run = Run(
        settings,
        accelerator,
        output_dir,
        cohort,
        replace(config, norm_training=training, fixed_norms=module.fixed_norms),
        module,
        model,
        optimizer,
        mesh,
        sharing,
        HostStacks(accelerator.device),
        isinstance(module.encoder.forward, TakesHostTiles) and bool(module.encoder.forward.takes_host_tiles),
        comm,
        checkpoint,
        task=config.target_task,
        teacher=teacher,
        failures=FailureLog(cohort.manifest.slides, cohort.grids, settings.policies.reading.max_failed_fraction),
        average=_average(module, settings.optim.ema_decay),
        saver=Saver(settings.run.save_beside),
    )
    _check_steps(run)
    return run


def _check_steps(run: Run) -> None:
    """Refuse, or tell, what steps of so few bags cannot teach."""
    require_cox_steps(run)
    if batch_norms(run.module.encoder) and not run.module.encoder_is_frozen:
        training = run.config.norm_training
        warn_of_few_bags(training, bags_of_population(training, run.step_layout))


def _require_settings(settings: TrainSettings) -> None:
    """Refuse settings that contradict each other, before an engine is started."""
    require_task_settings(settings)
    if settings.policies.tile_parallel.size > 1 and settings.policies.stacking.framework == "padding":
        raise ValueError('framework must not be "padding" where ranks share bags, got tile_parallel.size > 1')
    require_teachable(settings)
    check_feature_settings(settings)
    at_rest = {
        "--features_dir": settings.data.features_dir is not None,
        "--freeze_encoder": settings.model.freeze_encoder,
        "--lora_rank": settings.model.lora_rank > 0,
    }
    if settings.optim.l2_sp and any(at_rest.values()):
        given = next(name for name, is_given in at_rest.items() if is_given)
        raise ValueError(
            f"--l2_sp must be given with an encoder whose own weights are trained, got {given}. HINT: leave out one "
            "of them."
        )
    if settings.model.freeze_encoder_epochs >= settings.optim.num_train_epochs:
        raise ValueError(
            f"--freeze_encoder_epochs must be less than --num_train_epochs, {settings.optim.num_train_epochs}, got "
            f"{settings.model.freeze_encoder_epochs}. HINT: --freeze_encoder never trains the encoder."
        )


def _require_engine(settings: TrainSettings, accelerator: Accelerator) -> None:
    """Refuse what the engine cannot serve, before slides are read."""
    plugin = accelerator.state.deepspeed_plugin
    if settings.model.freeze_encoder_epochs and plugin is not None and plugin.zero_stage == 3:
        raise ValueError(
            "--freeze_encoder_epochs must be 0 at ZeRO stage 3, where an encoder without a graph has no parameters to "
            f"hand gradients to, got {settings.model.freeze_encoder_epochs}. HINT: take stage 2."
        )


def _opened(
    settings: TrainSettings, accelerator: Accelerator, on_folder: Callable[[Path], object] | None
) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint to go on from where there is one, which is of this run. Collective."""
    output_dir = output_folder(settings, accelerator)
    accelerator.project_configuration.set_directories(str(output_dir))
    accelerator.project_configuration.logging_dir = str(output_dir)
    if accelerator.is_main_process and on_folder is not None:
        on_folder(output_dir)
    checkpoint = checkpoint_of(settings, accelerator, output_dir)
    if checkpoint is not None:
        require_same(known_early(settings, accelerator.num_processes), checkpoint)  # before hours of tiling
    return output_dir, checkpoint


def _checked_cohort(settings: TrainSettings, accelerator: Accelerator, output_dir: Path, write_grids: bool) -> Cohort:
    """The run's cohort, with what its settings ask of it; the splits are written. Collective."""
    check_encoder(settings, accelerator)
    cohort = cohort_of(settings, accelerator, output_dir, write_grids)
    require_splits(cohort)
    if accelerator.is_main_process:
        write_splits(cohort.manifest, output_dir)
    require_metric(settings.run, cohort)
    weights = settings.optim.class_weights
    if weights is not None and len(weights) != len(cohort.manifest.classes):
        raise ValueError(
            f"--class_weights must be one for each of {', '.join(cohort.manifest.classes)}, got {len(weights)}. "
            "HINT: one number per class, in this order."
        )
    if cohort.in_dim is None:
        slides = [part.entry for part in cohort.parts()]
        require_store(settings.policies.reading.tile_store, slides, cohort.tile_grids)
    return cohort


def _built(
    settings: TrainSettings, accelerator: Accelerator, cohort: Cohort
) -> tuple[ModelConfig, SlideModel, Teacher | None]:
    """The model and its description, and the teacher that knows it as it is now."""
    of_task = task_config(settings, cohort.manifest)
    config, module = build_slide_model(settings, accelerator, cohort.manifest.classes, cohort.in_dim, of_task)
    teacher = open_teacher(settings, cohort, config, module)
    module.tells_features = teacher is not None
    return config, module, teacher


def _prepared(
    accelerator: Accelerator, module: SlideModel, settings: TrainSettings, engine: EngineSettings
) -> tuple[nn.Module, Any]:
    """The model as the engine wraps it, and its optimizer. Collective."""
    factor, optim = settings.encoder_factor, settings.optim
    apart = settings.model.freeze_encoder_epochs > 0 or factor != 1.0
    groups = None
    if optim.layer_decay != 1 or optim.no_decay_1d or optim.l2_sp:
        groups = parameter_groups(module, optim.layer_decay, no_decay_1d=optim.no_decay_1d)
        logger.info("parameter groups: %s", words_of(groups))
    model, optimizer = prepare(accelerator, module, engine, module.encoder if apart else None, groups)
    if factor != 1.0:
        encoder_rate = settings.optim.learning_rate * factor
        logger.info("learning rate: %g, of the encoder %g", settings.optim.learning_rate, encoder_rate)
    if optim.l2_sp:
        pull_to_start(module, optimizer, optim.l2_sp, ENCODER)  # before a checkpoint is put back
        logger.info("L2-SP: the encoder is drawn to its starting weights by %g", optim.l2_sp)
    if settings.optim.demon:
        set_beta(optimizer, settings.optim.demon)  # refuses an optimizer without
    return model, optimizer


def _tell_evaluation(settings: TrainSettings, cohort: Cohort) -> None:
    if cohort.in_dim is None:
        words = precision_words(settings.run.eval_precision)
        logger.info("validation and test: encoder in %s (--eval_precision)", words)


def _average(module: SlideModel, decay: float) -> WeightAverage | None:
    """The moving average of the weights; None where none is wanted."""
    if decay == 0:
        return None
    if is_zero3(module):
        raise ValueError(
            f"--ema_decay must be 0 at ZeRO stage 3, whose ranks hold parts of the weights, got {decay}. "
            "HINT: take stage 2."
        )
    return WeightAverage(module, decay)


def engine_settings(settings: TrainSettings) -> EngineSettings:
    """What an engine has to know of the settings."""
    optim = settings.optim
    return EngineSettings(
        learning_rate=optim.learning_rate,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        optimizer=optim.optim,
        bags_per_rank=optim.per_device_train_batch_size,
        accumulation=settings.micro_steps,
        mixed_precision=optim.mixed_precision,
        timeout_s=settings.run.ddp_timeout,
        fsdp=settings.run.fsdp,
        momentum=optim.momentum,
    )


def _flat(settings: TrainSettings) -> dict[str, Any]:
    groups = (settings.data, settings.task, settings.model, settings.optim, settings.run)
    return {
        name: value if isinstance(value, int | float | str | bool) else str(value)
        for group in groups
        for name, value in vars(group).items()
    }
