"""What the parts of a run share, and how it is prepared: folder, cohort, model, engine."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_wsi.bags.bag import FailureLog
from ds_wsi.bags.cohort import Cohort, load_cohort
from ds_wsi.bags.feature_cohort import load_feature_cohort
from ds_wsi.bags.manifest import Manifest
from ds_wsi.bags.packing import require_store
from ds_wsi.bags.relabel import with_positive
from ds_wsi.bags.run_splits import write_splits
from ds_wsi.bags.slide_policy import SkippedSlide, SlidePolicy, write_skipped
from ds_wsi.bags.step_layout import StepLayout
from ds_wsi.engines.accelerator.engine import (
    Accelerator,
    CommHandle,
    EngineSettings,
    attach_hook,
    broadcast_object_list,
    build_accelerator,
    prepare,
    take_steps_whole,
)
from ds_wsi.engines.machine.kernels import choose_memory_format, choose_tf32, search_kernels
from ds_wsi.engines.machine.nvme import NvmeSpill
from ds_wsi.engines.policies.norms import (
    apply_training,
    decide_training,
    partition_of,
    partition_population,
    warn_of_few_bags,
)
from ds_wsi.engines.sharded.zero import is_zero3
from ds_wsi.evaluation.metrics import METRIC_NAMES
from ds_wsi.models import ModelConfig, SlideModel, SlideOutput
from ds_wsi.norms import batch_norms
from ds_wsi.partition import PartitionPlan, PartitionPolicy, partition_layers, plan_partition
from ds_wsi.partition.planning.uniform import DEFAULT_CHUNK, planning_size
from ds_wsi.runtime.choices import precision_words
from ds_wsi.runtime.forwards import Handle
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.numerics import DTYPES
from ds_wsi.runtime.progress import Progress as Bar
from ds_wsi.slides.demo import DEMOS, make_demo
from ds_wsi.stacking.frameworks import pad_bags
from ds_wsi.stacking.host_tiles import HostStacks
from ds_wsi.stacking.packs import pack_bags
from ds_wsi.stacking.randomness import key_dropouts
from ds_wsi.tile_parallel import TileMesh, shard_tiles, tile_mesh
from ds_wsi.tile_parallel.shard import SharedForward
from ds_wsi.training.checkpoint import find_checkpoint
from ds_wsi.training.device_budget import with_budget
from ds_wsi.training.features import check_feature_settings
from ds_wsi.training.model import build_slide_model, check_encoder
from ds_wsi.training.optim import WeightAverage, set_beta
from ds_wsi.training.run_folder import begin, require_run_folder
from ds_wsi.training.same_run import known_early, require_same
from ds_wsi.training.saver import Saver
from ds_wsi.training.settings import TrainSettings
from ds_wsi.training.stopping import require_metric


@dataclass
class Progress:
    """Where a run stands: all of it is in the checkpoint's state.json."""

    epoch: int = 0
    step_in_epoch: int = 0
    global_step: int = 0
    loss_sum: float = 0.0
    bags_seen: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None
    pending: bool = False  # the last finished epoch is not validated yet
    skipped_steps: int = 0  # in which half precision overflowed, and nothing was changed


@dataclass
class Run:
    """What the parts of a run share."""

    settings: TrainSettings
    accelerator: Accelerator
    output_dir: Path
    cohort: Cohort
    config: ModelConfig
    module: SlideModel
    model: nn.Module
    optimizer: Any
    failures: FailureLog
    progress: Progress
    mesh: TileMesh
    sharing: Handle[SharedForward | None]
    stacks: HostStacks
    reads_host_tiles: bool  # the encoder takes stacks that lie on the host, and reads chunks of them
    comm: CommHandle | None = None
    average: WeightAverage | None = None
    checkpoint: Path | None = None  # to go on from
    epoch_seconds: float | None = None  # that the last epoch trained, in this start
    made_of: dict[str, Any] | None = None  # see `same_run.fingerprint`
    started: float = field(default_factory=time.perf_counter)  # of this start
    seconds_before: float = 0.0  # of earlier starts, up to the checkpoint of each
    starts: int = 1
    saved: float = field(default_factory=time.perf_counter)  # when the last checkpoint was written
    saver: Saver = field(default_factory=Saver)  # of checkpoints
    save_is_due: bool = False  # by the time since then, as the main process has it: the same on all ranks
    stop_is_due: bool = False  # a rank was asked to end, or the time is over: the same on all ranks

    @property
    def device(self) -> torch.device:
        """Where tiles and model are."""
        return self.accelerator.device

    @property
    def has_own_engine(self) -> bool:
        """Whether DeepSpeed, and not torch alone, sums gradients and steps."""
        return self.accelerator.state.deepspeed_plugin is not None

    @property
    def step_layout(self) -> StepLayout:
        """The size of a step: how many bags each group of ranks that share them trains on."""
        return self.settings.step_layout(self.mesh.slide_size)

    @property
    def seconds(self) -> float:
        """Of all starts together, until now."""
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def training_tiles(self) -> list[int]:
        """Tiles of each training slide that one rank takes at a time."""
        wanted = self.settings.policies.reading.tiles_per_slide
        lengths = [self.cohort.lengths[row] for row in self.cohort.rows("train")]
        return [-(-min(length, wanted or length) // self.mesh.tile_size) for length in lengths]


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
        settings: of the run.
        deepspeed_config: the DeepSpeed JSON, or None for DDP or one process.
        on_folder: called on the main process with the run's folder as soon as it is there.
        on_connected: called on every process once they can reach each other, before anything is prepared.
        write_grids: False writes nothing to the folder of the grids, see `load_cohort`.

    Raises:
        ManifestError: lists everything that is wrong with the cohort.
        ValueError: settings that contradict each other.
    """
    if settings.run.metric_for_best_model not in METRIC_NAMES:
        raise ValueError(
            f"--metric_for_best_model must be one of {', '.join(METRIC_NAMES)}, "
            f"got {settings.run.metric_for_best_model!r}"
        )
    if settings.policies.tile_parallel.size > 1 and settings.policies.stacking.framework == "padding":
        raise ValueError('framework must not be "padding" where ranks share bags, got tile_parallel.size > 1')
    check_feature_settings(settings)
    if settings.model.freeze_encoder_epochs >= settings.optim.num_train_epochs:
        raise ValueError(
            f"--freeze_encoder_epochs must be less than --num_train_epochs, {settings.optim.num_train_epochs}, got "
            f"{settings.model.freeze_encoder_epochs}. HINT: --freeze_encoder never trains the encoder."
        )
    engine = engine_settings(settings)
    accelerator = build_accelerator(engine, Path(settings.run.output_dir or "runs"), deepspeed_config)
    on_connected()
    plugin = accelerator.state.deepspeed_plugin
    if settings.model.freeze_encoder_epochs and plugin is not None and plugin.zero_stage == 3:
        raise ValueError(
            "--freeze_encoder_epochs must be 0 at ZeRO stage 3, where an encoder without a graph has no parameters to "
            f"hand gradients to, got {settings.model.freeze_encoder_epochs}. HINT: take stage 2."
        )
    output_dir = _output_dir(settings, accelerator)
    accelerator.project_configuration.set_directories(str(output_dir))
    accelerator.project_configuration.logging_dir = str(output_dir)
    if accelerator.is_main_process and on_folder is not None:
        on_folder(output_dir)
    checkpoint = _checkpoint(settings, accelerator, output_dir)
    if checkpoint is not None:
        require_same(known_early(settings, accelerator.num_processes), checkpoint)  # before hours of tiling
    check_encoder(settings, accelerator)
    cohort = _load_cohort(settings, accelerator, output_dir, write_grids)
    _require_splits(cohort)
    if accelerator.is_main_process:
        write_splits(cohort.manifest, output_dir)
    require_metric(settings.run, cohort)
    weights = settings.optim.class_weights
    if weights is not None and len(weights) != len(cohort.manifest.classes):
        raise ValueError(
            f"--class_weights must be one for each of {', '.join(cohort.manifest.classes)}, got {len(weights)}. "
            "HINT: one number a class, in this order."
        )
    if cohort.in_dim is None:
        require_store(settings.policies.reading.tile_store, cohort.manifest.slides, cohort.tile_grids)
    config, module = build_slide_model(settings, accelerator, cohort.manifest.classes, cohort.in_dim)
    training = decide_training(settings.policies.norm, partition_population(settings.policies.partition), module)
    config = replace(config, norm_training=training)
    _choose_kernels(module, settings, cohort, accelerator)  # before anything is shared: a trial is each rank's own
    mesh, sharing = _replace_forwards(module, settings, cohort, accelerator, training)
    factor = settings.encoder_factor
    apart = settings.model.freeze_encoder_epochs > 0 or factor != 1.0
    model, optimizer = prepare(accelerator, module, engine, apart=module.encoder if apart else None)
    if factor != 1.0:
        own = settings.optim.learning_rate * factor
        logger.info("learning rate: %g, of the encoder %g", settings.optim.learning_rate, own)
    if settings.optim.demon:
        set_beta(optimizer, settings.optim.demon)  # refuses an optimizer without
    if cohort.in_dim is None:
        words = precision_words(settings.run.eval_precision)
        logger.info("validation and test: encoder in %s (--eval_precision)", words)
    comm = attach_hook(accelerator, model, settings.policies.compression)
    failures = FailureLog(cohort.manifest.slides, cohort.grids, settings.policies.reading.max_failed_fraction)
    accelerator.init_trackers("tensorboard", config=_flat(settings))
    run = Run(
        settings,
        accelerator,
        output_dir,
        cohort,
        config,
        accelerator.unwrap_model(model),
        model,
        optimizer,
        failures,
        Progress(),
        mesh,
        sharing,
        HostStacks(accelerator.device),
        bool(getattr(module.encoder.forward, "takes_host_tiles", False)),
        comm,
        _average(accelerator.unwrap_model(model), settings.optim.ema_decay),
        checkpoint,
        saver=Saver(settings.run.save_beside),
    )
    if batch_norms(module.encoder) and not module.encoder_is_frozen:
        warn_of_few_bags(training, 1 if training == "bag" else run.step_layout.bags_per_step)
    return run


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


def _replace_forwards(
    module: SlideModel, settings: TrainSettings, cohort: Cohort, accelerator: Accelerator, training: str
) -> tuple[TileMesh, Handle[SharedForward | None]]:
    """Put in the place of the model's forwards what the policies ask for, in the one order that is exact.

    1. Dropouts are keyed by bag: whatever computes the aggregator later calls them.
    2. Packs, or padding, lie on the aggregator's own forward, because they cut a stack into what it computes.
    3. Sharing lies over them: it gathers a bag's features first, and its aggregator then packs whole bags.
    4. Norms get their population once they know the ranks that share a bag.
    5. The partition comes last, because it looks at the encoder as it will be called, its shared norms included.

    The engine wraps the model afterwards; under ZeRO-3 it ties the leaf modules over all of these (`gather_as_one`).
    """
    key_dropouts(module.aggregator)
    stacking = settings.policies.stacking
    if stacking.framework == "padding":
        pad_bags(module.aggregator, SlideOutput)
    else:
        pack_bags(module.aggregator, stacking.pack_bytes)
    mesh = tile_mesh(settings.policies.tile_parallel.size, accelerator.device.type)
    sharing = shard_tiles(module, mesh, settings.policies.tile_parallel)
    if training == "step":
        take_steps_whole(accelerator)
    apply_training(training, settings.policies.norm, module)
    _partition(module, settings, cohort, accelerator, mesh)
    return mesh, sharing


def _partition(
    module: SlideModel, settings: TrainSettings, cohort: Cohort, accelerator: Accelerator, mesh: TileMesh
) -> None:
    """Partition the encoder as the policies say, and print the plan for the largest stack of training bags.

    Ranks that share a population take one plan, the first rank's: their norms' collectives must come in one order.

    Raises:
        ValueError: not even that fits the budgets, names what is missing; or a mode that the engine cannot serve.
    """
    if cohort.in_dim is not None:
        return  # features: there is no encoder
    together = settings.micro_steps if module.norm_training == "step" else 1
    device = accelerator.device
    can_plan = device.type == "cuda"
    wanted = partition_of(settings.policies.partition, module.norm_training, together, can_plan=can_plan)
    several_bags = settings.optim.per_device_train_batch_size > 1 or settings.policies.stacking.deals
    if wanted.mode == "paper" and accelerator.is_fsdp2 and several_bags:
        raise ValueError(
            '--partition must not be "paper" under FSDP2 with several slides a process and micro-step: it computes bag '
            "by bag, and processes with more bags would wait for the others for ever. HINT: another mode, or one slide."
        )
    if wanted.mode == "native":
        plugin = accelerator.state.deepspeed_plugin
        # They gather a module at each call, on all ranks together; ranks have stacks of more and fewer bags. Where each
        # rank calls the encoder once a micro-step, FSDP2 gathers it block by block.
        if (plugin is not None and plugin.zero_stage == 3) or (accelerator.is_fsdp2 and several_bags):
            partition_layers(module.encoder, PartitionPolicy(mode="native", bn_population="bag"))
        return
    if isinstance(wanted, PartitionPolicy) and wanted.mode != "paper":
        wanted = with_budget(wanted, module, settings, accelerator, validates=bool(cohort.rows("validation")))
    if isinstance(wanted, PartitionPolicy) and not module.encoder_is_frozen:
        longest = max(cohort.lengths[row] for row in cohort.rows("train"))
        longest = min(longest, settings.policies.reading.tiles_per_slide or longest)
        shares = settings.policies.tile_parallel.shares or (1.0,) * mesh.tile_size
        tiles = math.ceil(longest * max(shares) / sum(shares))
        size = settings.policies.tiling.tile_size_px
        precision = DTYPES[settings.optim.mixed_precision]
        tiles *= settings.optim.per_device_train_batch_size * together
        # As bags of this length are planned, so that what is told is what is used.
        shape = (planning_size(tiles) if wanted.mode == "auto" else tiles, 3, size, size)
        plan = plan_partition(module.encoder, shape, wanted, autocast=precision, device=device)
        logger.info("%s", plan.summary)
        logger.debug("%s", plan)
        one_plan = mesh.tile_size > 1 or (module.norm_training == "step" and accelerator.num_processes > 1)
        if one_plan and wanted.mode == "auto":
            wanted = PartitionPlan.from_section(broadcast_object_list([plan.to_section()])[0])
    elif isinstance(wanted, PartitionPlan):
        logger.info("%s", wanted)
    # A plan that ranks share is no policy any more.
    check = getattr(settings.policies.partition, "check", True)
    partition_layers(module.encoder, wanted, spill=NvmeSpill.of(wanted), check=check)


def _choose_kernels(module: SlideModel, settings: TrainSettings, cohort: Cohort, accelerator: Accelerator) -> None:
    """What a GPU computes with, each choice in the log."""
    device, partition = accelerator.device, settings.policies.partition
    choose_tf32(settings.run.tf32, device)
    if cohort.in_dim is not None:
        return
    in_chunks = isinstance(partition, PartitionPlan) or partition.mode not in ("auto", "native")
    search_kernels(device, one_size=in_chunks)
    size = settings.policies.tiling.tile_size_px
    tiles = partition.chunk_size or DEFAULT_CHUNK["batch"]
    with accelerator.autocast():
        choose_memory_format(
            module,
            settings.run.memory_format,
            (tiles, 3, size, size),
            device,
            agree=lambda name: str(broadcast_object_list([name])[0]),
        )


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


def _output_dir(settings: TrainSettings, accelerator: Accelerator) -> Path:
    """The run's folder, the same on every rank: as given, a checkpoint's parent, or a new one named by the time."""
    run = settings.run
    asked = asked_folder(settings)
    path = asked or Path(broadcast_object_list([f"runs/{time.strftime('%Y%m%d-%H%M%S')}"])[0])
    require_run_folder(path, resumes=run.resume_from_checkpoint is not None)
    # Before any rank writes to it, for the checks above must see the same folder on every rank.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        begin(path)
    return path


def _checkpoint(settings: TrainSettings, accelerator: Accelerator, output_dir: Path) -> Path | None:
    """The checkpoint that the settings ask for, where there is one. Collective."""
    wanted = settings.run.resume_from_checkpoint
    if wanted is None:
        return None
    # Chosen by one process: another could find a checkpoint torn that this one has not finished reading.
    found = [find_checkpoint(output_dir, wanted) if accelerator.is_main_process else None]
    chosen: Path | None = broadcast_object_list(found)[0]
    return chosen


def _load_cohort(settings: TrainSettings, accelerator: Accelerator, output_dir: Path, write_grids: bool) -> Cohort:
    cohort = _read_cohort(settings, accelerator, output_dir, write_grids)
    # After splits are drawn: those do not depend on it.
    found = with_positive(cohort.manifest, settings.data.positive_class)
    if len(found.classes) == 2:
        logger.info("positive class, whose f1 is told: %s (--positive_class)", found.classes[1])
    return replace(cohort, manifest=found)


def _read_cohort(settings: TrainSettings, accelerator: Accelerator, output_dir: Path, write_grids: bool) -> Cohort:
    data, policies = settings.data, settings.policies

    def checked(manifest: Manifest) -> Manifest:
        with_positive(manifest, data.positive_class)  # told before slides are tiled
        return manifest

    # The main process tiles and writes the grids, the others then read them.
    with accelerator.main_process_first():
        manifest = data.manifest or make_demo(data.demo_folder, DEMOS[data.demo]())
        if data.features_dir is not None:
            return load_feature_cohort(
                manifest,
                data.features_dir,
                check=data.check_features,
                record_dir=data.tiles_dir or output_dir / "tiles",
                classes=data.classes,
                seed=data.split_seed,
                workers=max(1, policies.reading.workers),
                write_record=write_grids,
                choose=checked,
            )

    def load(skipped: tuple[SkippedSlide, ...] | None) -> Cohort:
        shown = accelerator.is_main_process and not settings.run.disable_tqdm
        with Bar("opening and tiling", "slide", shown=shown) as bar:
            return load_cohort(
                manifest,
                policies.tiling,
                tiles_dir=data.tiles_dir or output_dir / "tiles",
                classes=data.classes,
                slide_mpp=data.slide_mpp,
                seed=data.split_seed,
                workers=max(1, policies.reading.workers),
                write_grids=write_grids,
                choose=checked,
                slides=SlidePolicy(data.tissue_masks, data.masks_in_bounds, data.skip_bad_slides, skipped),
                on_slide=bar.step,
            )

    # Which slides are left out is the main process's to say: another could find another file unreadable.
    cohort = load(None) if accelerator.is_main_process else None
    skipped = broadcast_object_list([None if cohort is None else cohort.skipped])[0]
    if cohort is None:
        return load(skipped)
    if write_grids:
        write_skipped(output_dir, cohort.skipped)
    return cohort


def _require_splits(cohort: Cohort) -> None:
    for split in ("train", "test"):
        if not cohort.rows(split):
            raise ValueError(
                f"the {split} split must hold at least one slide, got none ({cohort.manifest.source}). "
                "HINT: give some slides this split, or leave the column out and splits are drawn by patient."
            )
    if not cohort.rows("validation"):
        logger.warning("no validation split: the last epoch's weights are exported")


def _flat(settings: TrainSettings) -> dict[str, Any]:
    groups = (settings.data, settings.model, settings.optim, settings.run)
    return {
        name: value if isinstance(value, int | float | str | bool) else str(value)
        for group in groups
        for name, value in vars(group).items()
    }
