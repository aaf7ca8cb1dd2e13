"""What a model's norms average over in training: decided once, before an engine wraps it."""

from dataclasses import replace
from typing import Any

import torch.distributed as dist

from ds_wsi.models import SlideModel
from ds_wsi.norms import NormPolicy, batch_norms, starts_fresh
from ds_wsi.norms.shared import share_norms
from ds_wsi.partition import PartitionPlan, PartitionPolicy
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.words import counted

# A norm needs other bags beside a bag to see what tells it from them; the papers' tables have two, ours eight.
FEW_BAGS = 4


def decide_training(policy: NormPolicy, bn_population: str, module: SlideModel) -> str:
    """What the norms average over in training: the policy's word, or what its "auto" means for this model.

    Args:
        policy: the norms' policy.
        bn_population: the partition's, which said so before there was a policy; its "bag" is taken for one.
        module: built, with its weights, and with what is frozen of it frozen; in training mode.

    Returns:
        "bag", "stack", "step" or "frozen"; "bag", which says nothing, where the encoder has no BatchNorm.

    Raises:
        ValueError: the policy contradicts the partition, or asks norms that it trains to go without weights.
    """
    norms = batch_norms(module.encoder)
    if not norms:
        return "bag"
    if not any(norm.training for norm in norms):
        return "frozen"  # with what is frozen of the encoder
    training, fresh = policy.training, starts_fresh(module.encoder)
    tracks = any(norm.running_mean is not None for norm in norms)
    if bn_population == "bag" and training not in ("auto", "bag"):
        raise ValueError(
            f'partition.bn_population must not be "bag" where norm.training is "{training}", got both. '
            "HINT: leave out the former."
        )
    if training == "auto":
        training = "bag" if bn_population == "bag" else "step" if fresh else "frozen"
        of_fresh = "its statistics are new" if tracks else "it has no running statistics"
        why = of_fresh if fresh else "its statistics were loaded"
        logger.info("norm.training: %s, for the encoder's BatchNorm: %s", training, why)
    if training == "frozen" and fresh:
        _warn_of_frozen(tracks=tracks)
    if not policy.affine and training != "frozen":
        raise ValueError(
            f'norm.affine must be true where norm.training is "{training}", got false. HINT: --norm_training frozen.'
        )
    return training


def _warn_of_frozen(*, tracks: bool) -> None:
    """Say what frozen norms do that have nothing to be frozen with."""
    if tracks:
        logger.warning(
            "norm.training is frozen, of an encoder whose statistics were never taken: its BatchNorm normalises "
            "nothing. HINT: --encoder_weights, --pretrained, or --norm_training step."
        )
    else:
        logger.warning(
            "norm.training is frozen, of an encoder whose BatchNorm has no running statistics: it averages over each "
            "bag still. HINT: --norm_training step."
        )


def apply_training(training: str, policy: NormPolicy, module: SlideModel) -> None:
    """Let the norms average over what was decided, in place; before the model is partitioned and wrapped. Collective.

    Norms over a step share a process group of their own: its collectives must not mix with the engine's.
    """
    if training == "frozen" and not policy.affine:
        for norm in batch_norms(module.encoder):
            norm.requires_grad_(False)
    module.set_norms(training)
    if training == "step" and dist.is_initialized() and dist.get_world_size() > 1:
        share_norms(module.encoder, dist.new_group(), of_step=True)


def warn_of_few_bags(
    training: str, bags_in_step: int, remedy: str = "--bags_per_step 8, or an encoder with weights"
) -> None:
    """Say that a population of few bags is a poor one, once, where the norms average over it."""
    if training in ("bag", "step", "stack") and bags_in_step < FEW_BAGS:
        logger.warning(
            "norm.training %s: the encoder's BatchNorm averages over %s in training, and takes out of its "
            "features what such few have in common. HINT: %s.",
            *(training, counted(bags_in_step, "slide"), remedy),
        )


def partition_of(
    partition: PartitionPlan | PartitionPolicy, training: str, micro_steps: int, *, can_plan: bool = False
) -> Any:
    """The partition whose populations the model decides, call by call.

    A step's micro-steps in one call hold the activations of all of them: what would run as it is, is planned where that
    can be (`can_plan`): on a GPU, because a CPU has no budget.
    """
    if (
        can_plan
        and training == "step"
        and micro_steps > 1
        and partition.mode == "native"
        and isinstance(partition, PartitionPolicy)
    ):
        partition = replace(partition, mode="auto")
        logger.info("norm.training step: %d micro-steps are encoded together, and planned as a partition", micro_steps)
    return partition if partition.mode == "paper" else replace(partition, bn_population="bag")


def partition_population(partition: PartitionPlan | PartitionPolicy) -> str:
    """What a partition that was asked for says of its populations: "bag" or "stack"; where there is none, "stack"."""
    return "stack" if partition.mode == "native" else partition.bn_population
