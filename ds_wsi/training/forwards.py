"""What lies on the model of a run: dropouts by bag, packs, sharing, norms, partition; and the kernels."""

import math

from ds_wsi.bags.cohort import Cohort
from ds_wsi.engines.accelerator.engine import (
    Accelerator,
    broadcast_object_list,
    take_steps_whole,
)
from ds_wsi.engines.machine.kernels import choose_memory_format, choose_tf32, search_kernels
from ds_wsi.engines.machine.nvme import NvmeSpill
from ds_wsi.engines.policies.norms import (
    apply_training,
    partition_of,
)
from ds_wsi.models import SlideModel, SlideOutput
from ds_wsi.partition import PartitionPlan, PartitionPolicy, partition_layers
from ds_wsi.partition.planning.search import find_plan
from ds_wsi.partition.planning.uniform import DEFAULT_CHUNK, planning_size
from ds_wsi.runtime.forwards import Handle
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.numerics import DTYPES
from ds_wsi.stacking.frameworks import pad_bags
from ds_wsi.stacking.packs import pack_bags
from ds_wsi.stacking.randomness import key_dropouts
from ds_wsi.tile_parallel import TileMesh, shard_tiles, tile_mesh
from ds_wsi.tile_parallel.shard import SharedForward
from ds_wsi.training.device_budget import with_budget
from ds_wsi.training.settings import TrainSettings


def replace_forwards(
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
    partition = partition_of(settings.policies.partition, module.norm_training, together, can_plan=can_plan)
    several_bags = settings.optim.per_device_train_batch_size > 1 or settings.policies.stacking.deals
    if partition.mode == "paper" and accelerator.is_fsdp2 and several_bags:
        raise ValueError(
            '--partition must not be "paper" under FSDP2 with several slides per process and micro-step: it computes '
            "bag by bag, and processes with more bags would wait for the others for ever. HINT: another mode, or one "
            "slide."
        )
    if partition.mode == "native":
        plugin = accelerator.state.deepspeed_plugin
        # They gather a module at each call, on all ranks together; ranks have stacks of more and fewer bags. Where each
        # rank calls the encoder once per micro-step, FSDP2 gathers it block by block.
        if (plugin is not None and plugin.zero_stage == 3) or (accelerator.is_fsdp2 and several_bags):
            partition_layers(module.encoder, PartitionPolicy(mode="native", bn_population="bag"))
        return
    if isinstance(partition, PartitionPolicy) and partition.mode != "paper":
        partition = with_budget(partition, module, settings, accelerator, validates=bool(cohort.rows("validation")))
    if isinstance(partition, PartitionPolicy) and not module.encoder_is_frozen:
        longest = max(settings.tile_budget.taken(cohort.grids[row]) for row in cohort.rows("train"))
        shares = settings.policies.tile_parallel.shares or (1.0,) * mesh.tile_size
        tiles = math.ceil(longest * max(shares) / sum(shares))
        size = settings.policies.tiling.tile_size_px
        precision = DTYPES[settings.optim.mixed_precision]
        tiles *= settings.optim.per_device_train_batch_size * together
        # As bags of this length are planned, so that what is told is what is used.
        shape = (planning_size(tiles) if partition.mode == "auto" else tiles, 3, size, size)
        answer = find_plan(module.encoder, shape, partition, autocast=precision, device=device)
        plan = answer.plan
        logger.info("%s", plan.summary)
        logger.info("partition: %s", answer.words)
        logger.debug("%s", plan)
        one_plan = mesh.tile_size > 1 or (module.norm_training == "step" and accelerator.num_processes > 1)
        if one_plan and partition.mode == "auto":
            partition = PartitionPlan.from_section(broadcast_object_list([plan.to_section()])[0])
    elif isinstance(partition, PartitionPlan):
        logger.info("%s", partition)
    # A plan that ranks share is no policy any more.
    given = settings.policies.partition
    check = given.check if isinstance(given, PartitionPolicy) else True
    partition_layers(module.encoder, partition, spill=NvmeSpill.of(partition), check=check)


def choose_kernels(module: SlideModel, settings: TrainSettings, cohort: Cohort, accelerator: Accelerator) -> None:
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
