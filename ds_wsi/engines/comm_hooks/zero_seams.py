"""Where a DeepSpeed engine hands over its gradients, stage by stage. It has no public place for that.

[Note: seams] One method an engine, or its optimizer, is replaced on that instance only:

    stage 0     engine.allreduce_bucket                   a list of gradients -> one flat mean
    stage 1, 2  optimizer.gradient_reduction_w_predivide  a flat bucket -> its mean (with reduce_scatter off)
    stage 3     optimizer.__avg_scatter_grads and         a bucket's parameters -> each one's partition
                __avg_scatter_contiguous_grads

Another signature than that of the table in `ds_wsi.runtime.seams` is refused, not tried.

[Note: one pass] Stages 2 and 3 reduce in every micro-step. With a hook, gradients stay local until the step's last one
(`engine.coalesce_grad_reduction`): a message a step, at the price of whole gradients in between. A DeepSpeed without it
sends in each micro-step, and a warning says so.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_wsi.engines.comm_hooks.patches import Patches
from ds_wsi.engines.comm_hooks.reducer import Reducer
from ds_wsi.engines.comm_hooks.zero_weights import Replicas
from ds_wsi.runtime.log import logger
from ds_wsi.runtime.seams import SEEN, check_replaced, check_seams, fp16_scale_of

_STAGE3 = "_DeepSpeedZeroOptimizer_Stage3"


def refuse(engine: Any) -> None:
    """Raise for what a hook cannot serve.

    Raises:
        ValueError: says what, and what to change.
        SeamError: another version's methods.
    """
    optimizer, stage = engine.optimizer, int(engine.zero_optimization_stage())

    def require(met: Any, words: str, hint: str) -> None:
        if not met:
            raise ValueError(f"{words} (DeepSpeed, ZeRO stage {stage}). HINT: {hint}")

    require(
        not getattr(engine, "has_moe_layers", False),
        "a model with a communication hook must be without experts, got a mixture of experts",
        "train it without a hook; experts are reduced over groups of their own",
    )
    compiled = getattr(engine, "is_deepcompile_enabled", None)
    require(
        compiled is None or not compiled(),
        "gradients must be reduced by the engine, got DeepCompile, whose graphs reduce them",
        "compile.deepcompile: false",
    )
    require(
        stage == 0 or getattr(optimizer, "contiguous_gradients", True),
        "zero_optimization.contiguous_gradients must be true for a hook, got false",
        "leave it out, true is its default",
    )
    require(
        not any(getattr(module, "sparse", False) is True for module in engine.module.modules()),
        "gradients must be dense for a hook, got an embedding's sparse ones",
        "sparse=False of the embedding",
    )
    quantized = getattr(optimizer, "all2all_process_group", None) is not None
    require(not quantized, "gradients must not be quantized twice, got zero_quantized_gradients", "leave it out")
    require(
        getattr(engine, "gradient_average", True) and int(getattr(engine, "sequence_parallel_size", 1)) == 1,
        "gradients must be averaged over all ranks, got a sum, or sequence parallelism",
        "train it without a hook",
    )
    require(
        not getattr(engine, "zenflow", False) and not getattr(engine, "pipeline_parallelism", False),
        "an engine with a hook must reduce at each step, got ZenFlow or a pipeline",
        "leave it out",
    )
    owner = engine if stage == 0 else optimizer
    check_replaced(owner, f"replaced zero{stage}")


def autocast_scaler(engine: Any) -> Any:
    """Torch's keeper of the loss scale under DeepSpeed's autocast, in one of two places; None where it has none."""
    first = getattr(engine, "torch_autocast_z0_gradscaler", None)
    return first or getattr(engine.optimizer, "torch_autocast_gradscaler", None)


def loss_scale_of(engine: Any) -> Callable[[], float] | None:
    """The engine's loss scale, or None where it has none."""
    scaler = autocast_scaler(engine)
    if scaler is not None:
        return lambda: float(scaler.get_scale())
    if engine.fp16_enabled():
        return fp16_scale_of(engine.optimizer)
    return None


def hook_engine(engine: Any, reducer: Reducer, *, pull: bool) -> Callable[[], None]:
    """Have a reducer do an engine's reductions; returns what undoes it.

    Args:
        pull: weights come back compressed (ZeRO 1 and 2): gradients then go to their owners alone.
    """
    check_seams("deepspeed", "hook zero")
    refuse(engine)
    stage, patches = int(engine.zero_optimization_stage()), Patches()
    if stage == 0:
        _hook_stage0(engine, reducer, patches)
    elif stage == 3:
        _hook_stage3(engine, reducer, patches)
    else:
        _hook_stage12(engine, reducer, patches, pull)
    if stage >= 2 and hasattr(engine, "coalesce_grad_reduction"):
        _coalesce(engine, patches)
    elif stage >= 2 and engine.gradient_accumulation_steps() > 1:
        logger.warning(
            "this DeepSpeed has no coalesce_grad_reduction: ZeRO %d sends in each micro-step, not once per step. "
            'HINT: pip install "deepspeed==%s".',
            *(stage, SEEN["deepspeed"][1]),
        )
    return patches.undo


def _names(engine: Any) -> dict[int, str]:
    return {id(parameter): name for name, parameter in engine.module.named_parameters()}


def _hook_stage0(engine: Any, reducer: Reducer, patches: Patches) -> None:
    def allreduce_bucket(self: Any, bucket: Sequence[Tensor], dp_group: Any, dp_world_size: Any = None) -> Tensor:
        at = {p.grad.data_ptr(): name for name, p in self.module.named_parameters() if p.grad is not None}
        # bf16's own optimizer hands over the flat gradients of whole groups: they have no other name than their place.
        names = [at.get(gradient.data_ptr(), f"group {index}") for index, gradient in enumerate(bucket)]
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        sent = flat.to(self.communication_data_type)
        return reducer.mean(sent, names, [gradient.numel() for gradient in bucket], dp_group).to(flat.dtype)

    patches.method(engine, "allreduce_bucket", allreduce_bucket)


def _hook_stage12(engine: Any, reducer: Reducer, patches: Patches, pull: bool) -> None:
    names = _names(engine)
    replicas = Replicas(engine.optimizer, names, reducer) if pull else None

    def gradient_reduction_w_predivide(self: Any, tensor: Tensor, communication_data_type: torch.dtype) -> Tensor:
        if tensor.numel() == 0:
            return tensor
        rows = [(group, index) for group, index, _ in self.ipg_buckets[communication_data_type].params]
        parameters = [self.bit16_groups[group][index] for group, index in rows]
        sent = tensor.to(communication_data_type)
        if replicas is not None:
            mean = replicas.push(sent, [group for group, _ in rows], parameters)
        else:
            bucket_names, numels = [names[id(p)] for p in parameters], [p.numel() for p in parameters]
            mean = reducer.mean(sent, bucket_names, numels, self.dp_process_group)
        tensor.copy_(mean)
        return mean

    patches.method(engine.optimizer, "gradient_reduction_w_predivide", gradient_reduction_w_predivide)
    patches.value(engine.optimizer, "reduce_scatter", False)
    if replicas is not None:
        replicas.attach(patches)


def _hook_stage3(engine: Any, reducer: Reducer, patches: Patches) -> None:
    names = _names(engine)

    def partitions(self: Any, parameters: Sequence[Any], flat: Tensor, dtype: torch.dtype) -> list[Tensor]:
        # Before 0.19.5 there is one group for all parameters.
        group_of = getattr(self, "_get_param_partition_group", None)
        group = self.dp_process_group if group_of is None else group_of(parameters[0])
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        numels = [p.ds_numel for p in parameters]
        mean = reducer.mean(flat.to(dtype), [names[id(p)] for p in parameters], numels, group)
        shards = []
        for parameter, whole in zip(parameters, mean.to(self.gradient_accumulation_dtype).split(numels)):
            size = math.ceil(parameter.ds_numel / world)
            part = whole[min(rank * size, len(whole)) : (rank + 1) * size]
            padded = torch.zeros(parameter.partition_numel(), dtype=part.dtype, device=part.device)
            padded[: len(part)] = part
            shards.append(padded)
        return shards

    def avg_scatter_grads(self: Any, params_to_reduce: Any, communication_data_type: torch.dtype) -> list[Tensor]:
        flat = torch.cat([p.grad.reshape(-1) for p in params_to_reduce])
        return partitions(self, params_to_reduce, flat, communication_data_type)

    def avg_scatter_contiguous_grads(
        self: Any, buffer_to_reduce: Tensor, communication_data_type: torch.dtype
    ) -> list[Tensor]:
        parameters = self.ipg_buckets[communication_data_type].params
        return partitions(self, parameters, buffer_to_reduce, communication_data_type)

    patches.method(engine.optimizer, f"{_STAGE3}__avg_scatter_grads", avg_scatter_grads)
    patches.method(engine.optimizer, f"{_STAGE3}__avg_scatter_contiguous_grads", avg_scatter_contiguous_grads)


def _coalesce(engine: Any, patches: Patches) -> None:
    """Reduce once per step ([Note: one pass])."""
    held: list[Any] = []  # the context of the step's micro-steps so far

    def backward(self: Any, *args: Any, **keywords: Any) -> Any:
        last = self.is_gradient_accumulation_boundary()
        if last and not held:
            return native(*args, **keywords)  # a step of one micro-step reduces while backward goes on
        if not held:
            held.append(self.coalesce_grad_reduction())
            held[0].__enter__()
        self.inside_no_sync_ctxt = True
        try:
            loss = native(*args, **keywords)
        finally:
            self.inside_no_sync_ctxt = False  # else step() refuses to count the micro-step
        if last:
            boundary = self._is_gradient_accumulation_boundary
            held.pop().__exit__(None, None, None)
            self._is_gradient_accumulation_boundary = boundary  # it goes back to what it was at the first micro-step
        return loss

    native = patches.method(engine, "backward", backward)
