"""The "ds_wsi" section in a loop of one's own: each of its keys is followed, or refused by name with what to do.

`initialize` applies what has to be done before an engine wraps the model (norm, partition, stacking.pack_bytes);
`attach` gets a wrapped one, and asks that it has been done. What names the bags of a step, or how slides are read, is a
matter of the loop that reads them.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from torch import nn

from ds_wsi.config import SECTION, DsWsiConfig, read_section
from ds_wsi.engines.machine.nvme import NvmeSpill
from ds_wsi.engines.policies.loops import Calls, decide_norms, require_whole_norms
from ds_wsi.engines.policies.norms import apply_training, partition_of
from ds_wsi.engines.sharded.zero import gather_as_one
from ds_wsi.models import SlideModel
from ds_wsi.norms import batch_norms
from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.partition.forward import PartitionedForward
from ds_wsi.runtime.contracts import HasAggregator, HasEncoder, SaysNorms
from ds_wsi.stacking.packs import PackedForward, pack_bags
from ds_wsi.tile_parallel.shard import SharedForward

_READS = "leave it out: your loop reads the bags; ds_wsi.load_cohort and `ds-wsi train` follow it"
_DEALS = "leave it out: your loader deals the bags; SlideTrainer and `ds-wsi train` follow it"
# Keys that no loop of one's own follows, and what to do; those not named are followed, or refused below.
_NOT_HERE = {
    "tiling": _READS,
    "reading": _READS,
    "augment": _READS,
    "stacking": _DEALS,
    "norm.recalibration_tiles": "leave it out: `ds-wsi train` takes statistics anew",
}
_FOLLOWED = ("stacking.pack_bytes",)


def read_followed(section: Mapping[str, Any]) -> DsWsiConfig:
    """The policies of a section that a loop of one's own can follow.

    Raises:
        ValueError: a key that is unknown, or that belongs to what the loop does; a default's value is no such.
    """
    policies = read_section(section)
    chosen, defaults = asdict(policies), asdict(DsWsiConfig())
    for name, values in section.items():
        for leaf in values if name in defaults else ():
            key = f"{name}.{leaf}"
            remedy = _NOT_HERE.get(key, _NOT_HERE.get(name))
            if remedy and key not in _FOLLOWED and chosen[name][leaf] != defaults[name][leaf]:
                raise _refused(key, chosen[name][leaf], "must not be given in a loop of your own", remedy)
    return policies


def require_done(section: Mapping[str, Any], model: nn.Module) -> DsWsiConfig:
    """The policies of the section of an engine that is there; what had to be done before it must have been.

    Raises:
        ValueError: as `read_followed`; or a key whose policy the model does not follow.
    """
    policies = read_followed(section)
    encoder, aggregator = _encoder(model), _aggregator(model)
    before = "ds_wsi.initialize does it; or before the engine wraps the model"
    if policies.partition.mode != "native" and not _has_forward(encoder, PartitionedForward):
        raise _refused(
            "partition",
            section.get("partition"),
            "must be applied before an engine wraps the model",
            f"{before}: ds_wsi.partition_layers(model.encoder, policy)",
        )
    if policies.stacking.pack_bytes and not _has_forward(aggregator, PackedForward):
        raise _refused(
            "stacking.pack_bytes",
            policies.stacking.pack_bytes,
            "must be applied before an engine wraps the model",
            f"{before}: ds_wsi.stacking.packs.pack_bags(model.aggregator, pack_bytes)",
        )
    norm = policies.norm
    # What is frozen of the encoder takes running statistics, whatever the word.
    frozen = not any(part.requires_grad for leaf in batch_norms(encoder) for part in leaf.parameters())
    present = (model.norm_training, model.norm_evaluation) if isinstance(model, SaysNorms) else (None, None)
    for name, word, current in zip(("training", "evaluation"), (norm.training, norm.evaluation), present, strict=True):
        if word not in ("auto", current) and batch_norms(encoder) and not (frozen and current == "frozen"):
            raise _refused(
                f"norm.{name}",
                word,
                "must be applied before an engine wraps the model",
                f'{before}: SlideModel.set_norms({name}="{word}")',
            )
    _require_shared(policies, model)
    return policies


def apply_section(section: Mapping[str, Any], model: nn.Module, config: Mapping[str, Any]) -> DsWsiConfig:
    """Apply a section's norm, partition and stacking.pack_bytes to a model, in place, before DeepSpeed wraps it.

    Collective where the norm is over a step of several ranks.

    Args:
        section: the config's section.
        model: a SlideModel, or any other: it is then partitioned as a whole.
        config: DeepSpeed's config, filled.

    Raises:
        ValueError: as `read_followed`; or a policy that this model cannot follow.
    """
    policies = read_followed(section)
    _require_shared(policies, model)
    encoder, aggregator = _encoder(model), _aggregator(model)
    if isinstance(model, SlideModel):  # another's may keep its norms whole by itself
        require_whole_norms(model, config)
        _apply_norms(policies, model.train(), config)
    elif "norm" in section and batch_norms(model):
        value = asdict(policies.norm)
        raise _refused("norm", value, "must be given with a SlideModel", "leave it out; or SlideModel(encoder, ...)")
    zero3 = (config.get("zero_optimization") or {}).get("stage") == 3
    partition = policies.partition
    if isinstance(model, SlideModel):
        partition = partition_of(partition, model.norm_training, 1)
    if not _has_forward(encoder, PartitionedForward):
        if partition.mode != "native":
            partition_layers(encoder, partition, spill=NvmeSpill.of(partition))
        elif zero3 and isinstance(model, SlideModel) and any(True for _ in encoder.parameters()):
            # ZeRO-3 gathers a module at each call, on all ranks together; ranks have more and fewer bags.
            partition_layers(encoder, PartitionPolicy(mode="native", bn_population="bag"))
    if policies.stacking.pack_bytes:
        if aggregator is None:
            key, size = "stacking.pack_bytes", policies.stacking.pack_bytes
            raise _refused(key, size, "must be given with a model that has an aggregator", "leave it out")
        if not _has_forward(aggregator, PackedForward):
            pack_bags(aggregator, policies.stacking.pack_bytes)
    if zero3:
        gather_as_one(model)
    return policies


def apply_default_norms(model: nn.Module, config: Mapping[str, Any]) -> None:
    """What `apply_section` does with a SlideModel's norms, in place, where the config has no section. Collective."""
    if isinstance(model, SlideModel):
        require_whole_norms(model, config)
        _apply_norms(DsWsiConfig(), model, config)


def _apply_norms(policies: DsWsiConfig, model: SlideModel, config: Mapping[str, Any]) -> None:
    """What the norms average over from now on, in training and in evaluation."""
    if not batch_norms(model.encoder):
        return
    world = dist.get_world_size() if dist.is_initialized() else 1
    bags, accumulation = _micro_batches(config, world)
    calls = Calls(
        bags=bags,
        accumulation=accumulation,
        processes=max(1, world // policies.tile_parallel.size),
        place="in a loop of your own",
        more_bags="8 bags in a call (train_micro_batch_size_per_gpu)",
    )
    norms = decide_norms(policies, model, calls)
    apply_training(norms.training, policies.norm, model)
    model.set_norms(evaluation=norms.evaluation)


def _micro_batches(config: Mapping[str, Any], world: int) -> tuple[int, int]:
    """(bags of a micro-step of one process, micro-steps of a step): DeepSpeed computes the size that is not given."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    step, micro, accumulation = (size if isinstance(size := config.get(name), int) else 0 for name in names)
    if not accumulation:
        accumulation = step // (micro * world) if step and micro else 1
    micro = micro or step // (max(1, accumulation) * world)
    return max(1, micro), max(1, accumulation)


def _require_shared(policies: DsWsiConfig, model: nn.Module) -> None:
    size = policies.tile_parallel.size
    if size != 1 and not _has_forward(_aggregator(model), SharedForward):
        raise _refused(
            "tile_parallel.size",
            size,
            "must be 1 where the model is not shared: your loop gives each rank its own tiles, and weighs the loss",
            "mesh = tile_mesh(size); shard_tiles(model, mesh, TileParallelPolicy(size)) before; loss * mesh.slide_size",
        )


def _encoder(model: nn.Module) -> nn.Module:
    """The model's encoder, or the model where it is not made of an encoder and an aggregator."""
    return model.encoder if isinstance(model, HasEncoder) and isinstance(model, HasAggregator) else model


def _aggregator(model: nn.Module) -> nn.Module | None:
    return model.aggregator if isinstance(model, HasAggregator) else None


def _has_forward(module: nn.Module | None, kind: type) -> bool:
    return module is not None and isinstance(module.__dict__.get("forward"), kind)


def _refused(key: str, value: Any, words: str, remedy: str) -> ValueError:
    return ValueError(f"{SECTION}.{key} {words}, got {value!r}. HINT: {remedy}.")
