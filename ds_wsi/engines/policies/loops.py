"""What a model's norms average over in a loop that is not ours: the HF Trainer's, or a user's own.

Such a loop calls the model once for each micro-step, so no population is larger than one call of all processes, and
nothing is measured: the evaluation follows from how many bags the norms see together in training.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ds_wsi.config import SECTION, DsWsiConfig
from ds_wsi.engines.policies.norms import FEW_BAGS, decide_training, partition_population, warn_of_few_bags
from ds_wsi.models import SlideModel
from ds_wsi.norms import batch_norms, natural_evaluation, starts_fresh
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.words import counted


@dataclass(frozen=True)
class Calls:
    """How a loop calls a model.

    Args:
        bags: bags per call of one process.
        accumulation: calls per optimizer step.
        processes: processes that have bags of their own.
        place: "under the HF Trainer"; for messages.
        more_bags: what gives a call more bags; for messages.
    """

    bags: int
    accumulation: int
    processes: int
    place: str
    more_bags: str


@dataclass(frozen=True)
class Norms:
    """What was decided: training "bag", "stack", "step" or "frozen", and evaluation "running" or "bag"."""

    training: str
    evaluation: str


def decide_norms(policies: DsWsiConfig, model: SlideModel, calls: Calls) -> Norms:
    """What the norms of a model average over in a loop, and in evaluation; says what was chosen, and warns of traps.

    What the policy says is taken. Where it says "auto", a model keeps what `set_norms` said, or config.json of the run
    that it came from; where nothing said anything, it is decided by the weights and by the bags of a call.

    Args:
        policies: the policies of norm and partition.
        model: a model whose encoder has BatchNorm, with its weights, and with what is frozen of it frozen. Its mode
            is left as it is.
        calls: how the loop calls the model.

    Raises:
        ValueError: what this loop cannot follow, with the remedy.
    """
    policy, population = policies.norm, partition_population(policies.partition)
    if policy.evaluation == "recalibrated":
        raise ValueError(
            f'{SECTION}.norm.evaluation must not be recalibrated {calls.place}, got "recalibrated": nothing is taken '
            "anew over the training slides. HINT: `ds-wsi train` does; or running."
        )
    keeps = _keeps(policies, model)
    norm_policy = replace(policy, training=model.norm_training) if keeps else policy
    mode = model.training
    training = decide_training(norm_policy, "stack" if keeps else population, model.train())
    model.train(mode)
    training = _within_a_call(training, policies, calls)
    if keeps:
        return _kept(training, model, calls)
    bags = _bags(training, calls)
    natural, evaluation = natural_evaluation(training, bags), policy.evaluation
    if evaluation == "auto" and model.norms_from is None and model.norm_evaluation == "bag":
        evaluation = "bag"  # set_norms said this one alone
    elif evaluation == "auto":
        evaluation = natural
        if natural == "bag":
            logger.info(
                "norm.evaluation: bag, each slide's own statistics, as in training (%s)", counted(bags, "slide")
            )
    _warn(training, evaluation, natural, calls, "leave norm.evaluation out")
    return Norms(training, evaluation)


def _keeps(policies: DsWsiConfig, model: SlideModel) -> bool:
    """Whether somebody has said what this model's norms average over, and the policies say nothing else."""
    policy, population = policies.norm, partition_population(policies.partition)
    if model.norms_from is None or policy.training != "auto" or not policy.affine:
        return False
    if model.norms_from == "config.json" and _is_as_built(model):
        return False
    return policy.evaluation in ("auto", model.norm_evaluation) and population in ("stack", model.norm_training)


def _is_as_built(model: SlideModel) -> bool:
    """Whether it was saved before it was trained, with the defaults, which nobody chose."""
    words = model.norm_training, model.norm_evaluation
    tracks = any(norm.running_mean is not None for norm in batch_norms(model.encoder))
    return words == (SlideModel.norm_training, SlideModel.norm_evaluation) and tracks and starts_fresh(model.encoder)


def _kept(training: str, model: SlideModel, calls: Calls) -> Norms:
    """The model's own, evaluated as before: what a loop gives its norms must not make another model of it."""
    bags, from_run = _bags(training, calls), model.norms_from == "config.json"
    evaluation = "bag" if model.norm_evaluation == "bag" else "running"  # what was taken anew does not last
    natural, why = natural_evaluation(training, bags), f"as {model.norms_from} says"
    if from_run and (evaluation, natural) == ("running", "bag"):
        training, natural = "frozen", "running"
        why = f"for the model has running statistics, and its norms would see {counted(bags, 'slide')} here"
    elif from_run and training != "frozen":
        natural = evaluation  # the run has measured it
    logger.info("norm.training: %s, norm.evaluation: %s, %s", training, evaluation, why)
    _warn(training, evaluation, natural, calls, f'set_norms(evaluation="{natural}")')
    return Norms(training, evaluation)


def _within_a_call(training: str, policies: DsWsiConfig, calls: Calls) -> str:
    """The word, or "stack" in the place of a step that calls cannot hold; refused where the policy asks for it."""
    is_asked = policies.norm.training == "step"
    if training != "step":
        return training
    if calls.accumulation > 1:
        if is_asked:
            raise ValueError(
                f"{SECTION}.norm.training must not be step with gradient_accumulation_steps > 1 {calls.place}, which "
                f'calls the model once for each, got {calls.accumulation}. HINT: "stack" is of the bags of a '
                "micro-step; or one micro-step of more bags: partitioned it takes no more memory."
            )
        logger.info(
            "norm.training: stack, the bags of a micro-step of one process, whose %d make up a step", calls.accumulation
        )
        return "stack"
    if calls.processes > 1 and policies.partition.mode == "auto":
        # Each process would plan for its own stack, and their norms wait for each other in different orders.
        if is_asked:
            raise ValueError(
                f"{SECTION}.norm.training must not be step on several processes with a partition that plans each call, "
                f'got {calls.processes} processes. HINT: name a mode of partition, such as "lean".'
            )
        logger.info("norm.training: stack, because the partition plans the call of each process by itself")
        return "stack"
    return training


def _bags(training: str, calls: Calls) -> int:
    """The bags in the population of one norm; 0 where there is none."""
    return {"bag": 1, "stack": calls.bags, "step": calls.bags * calls.processes}.get(training, 0)


def _warn(training: str, evaluation: str, natural: str, calls: Calls, remedy: str) -> None:
    """Warn once of few bags, and once of an evaluation with other statistics than those of training."""
    bags, others = _bags(training, calls), calls.more_bags
    if training != "frozen":
        others += ', norm.training "frozen" with an encoder that has weights, or one with GroupNorm ("resnet50_gn")'
        warn_of_few_bags(training, bags, remedy=others)
    if evaluation != natural:
        logger.warning(
            "norm.evaluation %s: the model that is exported is not the model that is trained, whose BatchNorm takes %s "
            "in training. HINT: %s%s.",
            evaluation,
            f"the statistics of {counted(bags, 'slide')}" if bags else "running statistics",
            remedy,
            f"; or {others}" if 0 < bags < FEW_BAGS else "",
        )


def require_whole_norms(model: nn.Module, config: Mapping[str, Any], also: Iterable[str] = ()) -> None:
    """Refuse half precision of DeepSpeed for a model with BatchNorm, whose forward would fail.

    Args:
        model: any model.
        config: DeepSpeed's config.
        also: kinds of half precision that are on beside the config's.

    Raises:
        ValueError: names the kind and the remedy.
    """
    halves = [kind for kind in ("bf16", "fp16") if kind in also or (config.get(kind) or {}).get("enabled") is True]
    if halves and batch_norms(model):
        raise ValueError(
            f"{halves[0]} must be off for BatchNorm under DeepSpeed, which halves its weights and not its statistics, "
            f'got it on. HINT: "torch_autocast": {{"enabled": true, "dtype": "bfloat16"}} in the JSON'
        )
