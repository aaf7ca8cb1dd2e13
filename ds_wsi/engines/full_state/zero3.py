"""Weights and the optimizer's state under ZeRO 3, whole and by parameter, through DeepSpeed's accessors."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_wsi.engines.full_state.entries import NUMBERS, as_number, flat_states
from ds_wsi.engines.sharded.zero import gathered
from ds_wsi.runtime.tensor_file import TensorFile


def take_zero3(module: nn.Module, zero: Any, inner: Any, keep: bool) -> dict[str, Tensor]:
    """See `take_state`. Collective: an all-gather of every state of every parameter."""
    from deepspeed.utils import safe_get_full_optimizer_state

    names, states = {id(parameter): name for name, parameter in module.named_parameters()}, dict[str, Tensor]()
    for parameters, shard in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        for kind, value in sorted(inner.state.get(shard, {}).items()):
            if value is None:
                continue
            is_number = not isinstance(value, Tensor) or value.dim() == 0
            for parameter in parameters:
                name = names[id(parameter)]
                if is_number:
                    states[f"{NUMBERS}/{kind}/{name}"] = as_number(float(value))
                    continue
                one = safe_get_full_optimizer_state(parameter, kind)
                if keep:
                    states[f"{kind}/{name}"] = one.to("cpu", copy=True)
    return states if keep else {}


def put_zero3(
    module: nn.Module,
    zero: Any,
    inner: Any,
    weights: TensorFile,
    states: TensorFile,
    by_name: dict[str, list[str]],
) -> None:
    """See `put_state`: weights too. Collective.

    Raises:
        ValueError: the optimizer's states are on a disk.
    """
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    if getattr(zero, "swap_optimizer", False):
        raise ValueError(
            "a run must be gone on with, with its optimizer's states in memory, got offload_optimizer.device nvme. "
            'HINT: "device": "cpu".'
        )
    zero.checkpoint_event_prologue()  # all are partitioned: what is changed is seen at the next gather
    for name, value in module.state_dict(keep_vars=True).items():
        if not hasattr(value, "ds_id"):
            value.data.copy_(weights.read_like(name, value))
            continue
        with gathered(value, modifier_rank=0):
            value.data.copy_(weights.read_like(name, value, value.ds_shape))
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for number, (parameters, shard) in enumerate(zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)):
        group = inner.param_groups[zero.sub_group_to_group_id[number]]
        inner.state[shard] = flat_states(inner, group, shard, [names[id(p)] for p in parameters], states, by_name)
        for parameter in parameters:
            name = names[id(parameter)]
            one = weights.read_like(name, parameter, parameter.ds_shape)
            safe_set_local_fp32_param(parameter, _part(one, parameter))
            for kind in by_name.get(name, []):
                if not kind.startswith(f"{NUMBERS}/"):
                    one = states.read_like(f"{kind}/{name}", parameter, parameter.ds_shape)
                    safe_set_local_optimizer_state(parameter, _part(one, parameter), kind)
        if not inner.state[shard]:
            del inner.state[shard]
    zero.checkpoint_event_epilogue()


def _part(whole: Tensor, parameter: Any) -> Tensor:
    """This rank's part of a parameter's entries, with zeros to its full length."""
    length = parameter.ds_tensor.numel()
    part = torch.zeros(length, dtype=whole.dtype)
    values = whole.reshape(-1)[dist.get_rank(parameter.ds_process_group) * length :][:length]
    part[: values.numel()] = values
    return part
