"""What an engine has learned, whole and by the model's own names: any engine on any number of ranks goes on from it.

    weights    parameters and buffers, by name
    optimizer  "exp_avg/NAME", "exp_avg_sq/NAME", ...: tensors of the parameter's shape
               "numbers/step/NAME": what an optimizer counts
               "master/NAME": float32 weights that the owners step, where the model computes with others (DMGC's pull)
    facts      JSON: which optimizer it was, its loss scale, DeepSpeed's counts

Tensors are gathered one at a time, and only the main process keeps them, on the host. A partition of ZeRO 1 and 2 is
read in zero12.py, that of ZeRO 3 in zero3.py.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ds_wsi.engines.accelerator.engine import Accelerator
from ds_wsi.engines.comm_hooks.zero_seams import autocast_scaler
from ds_wsi.engines.full_state.entries import MASTER, NUMBERS, as_number, make_number, number_of
from ds_wsi.engines.full_state.zero3 import put_zero3, take_zero3
from ds_wsi.engines.full_state.zero12 import put_zero12, take_zero12
from ds_wsi.engines.sharded.fsdp import copy_whole, whole
from ds_wsi.engines.sharded.zero import gathered, is_zero3
from ds_wsi.runtime.seams import check_seams
from ds_wsi.runtime.tensor_file import TensorFile

COUNTS = ("global_steps", "global_samples", "skipped_steps")  # of DeepSpeed's engine
# What must be as it was, or the steps would be another optimizer's. The rate and the decay are set at each step.
COMPARED = ("eps", "amsgrad", "momentum", "dampening", "nesterov", "maximize", "betas")


@dataclass(frozen=True)
class EngineState:
    """What `take_state` copies: tensors on the CPU, in memory of their own, on the main process alone."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    facts: dict[str, Any]


@torch.no_grad()
def take_state(accelerator: Accelerator, module: nn.Module, optimizer: Any) -> EngineState:
    """Copy the whole state to the main process's host memory, between two optimizer steps. Collective.

    Args:
        accelerator: the Accelerator of the engine.
        module: the unwrapped module.
        optimizer: the optimizer that `prepare` returned.

    Raises:
        ValueError: an optimizer that keeps what does not belong to a parameter; names it.
    """
    keep = accelerator.is_main_process
    weights = _take_weights(module, keep)
    inner, zero = inner_optimizer(optimizer), _zero_optimizer(accelerator)
    if zero is None:
        states = _take_plain(module, inner, keep)
    elif is_zero3(module):
        states = take_zero3(module, zero, inner, keep)
    else:
        states = take_zero12(module, zero, inner, keep)
    return EngineState(weights, states, _facts(accelerator, inner))


@torch.no_grad()
def put_state(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: Any,
    weights: TensorFile,
    states: TensorFile,
    facts: dict[str, Any],
    *,
    betas_move: bool = False,
) -> None:
    """Go on from what `take_state` returned, of any engine and number of ranks. Collective under ZeRO-3.

    Args:
        accelerator, module, optimizer: what `take_state` takes, just prepared.
        weights, states, facts: what it returned.
        betas_move: the first of Adam's betas is set at each step.

    Raises:
        ValueError: the state of another model or optimizer, or one that this engine cannot go on from; names it.
    """
    inner, zero = inner_optimizer(optimizer), _zero_optimizer(accelerator)
    _require_optimizer(describe_optimizer(inner), facts["optimizer"], betas_move=betas_move)
    _require_names(module, weights)
    by_name = _by_parameter(states)
    strangers = sorted(by_name.keys() - dict(module.named_parameters()).keys())
    if strangers:
        raise ValueError(f"{states.path} must hold states of the model's parameters, got one of {strangers[0]}")
    if zero is None or is_zero3(module):
        _require_no_master(by_name, states)
    if zero is None:
        _put_weights(module, weights)
        _put_plain(module, inner, states, by_name)
    elif is_zero3(module):
        put_zero3(module, zero, inner, weights, states, by_name)
    else:
        _put_weights(module, weights)
        put_zero12(module, zero, inner, states, by_name)
    scaler = _scaler(accelerator)
    if scaler is not None and facts["loss_scale"]:
        _put_scale(scaler, facts["loss_scale"])
    engine = _engine(accelerator)
    if engine is not None:
        for name in COUNTS:
            setattr(engine, name, int((facts["engine"] or {}).get(name, getattr(engine, name))))


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer that steps, under Accelerate's wrapper and ZeRO's."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def describe_optimizer(inner: Any) -> dict[str, Any]:
    """What makes two optimizers the same, whoever wrote them, as JSON has it."""
    kind = type(inner).__name__.lower()
    if kind in ("deepspeedcpuadam", "fusedadam"):
        kind = "adamw" if getattr(inner, "adam_w_mode", True) else "adam"
    group = inner.param_groups[0]
    description: dict[str, Any] = {"kind": kind}
    for name in COMPARED:
        if name in group:
            value = group[name]
            description[name] = [float(one) for one in value] if isinstance(value, tuple | list) else value
    return description


def _take_weights(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    weights = {}
    for name, value in _named(module):
        with gathered(value) if hasattr(value, "ds_id") else nullcontext():
            one = whole(value)
            if keep:
                weights[name] = one.to("cpu", copy=True)
    return weights


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers as the optimizer has them: of FSDP2 the shards."""
    yield from module.state_dict(keep_vars=True).items()


def _take_plain(module: nn.Module, inner: Any, keep: bool) -> dict[str, Tensor]:
    names = _parameter_names(module)
    states: dict[str, Tensor] = {}
    for group in inner.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            for kind, value in sorted(inner.state.get(parameter, {}).items()):
                if value is None:
                    continue
                number = None if kind != "step" and parameter.dim() == 0 else number_of(value, parameter)
                if number is not None:
                    states[f"{NUMBERS}/{kind}/{name}"] = as_number(number)
                    continue
                one = whole(value)
                if keep:
                    states[f"{kind}/{name}"] = one.to("cpu", copy=True)
    return states if keep else {}


def _put_weights(module: nn.Module, weights: TensorFile) -> None:
    for name, value in _named(module):
        copy_whole(value.data, weights.read_like(name, value).to(value.dtype))


def _put_plain(module: nn.Module, inner: Any, states: TensorFile, by_name: dict[str, list[str]]) -> None:
    names = _parameter_names(module)
    for group in inner.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            inner.state.pop(parameter, None)
            made: dict[str, Any] = {}
            for kind in by_name.get(name, []):
                if kind.startswith(f"{NUMBERS}/"):
                    value = float(states.read(f"{kind}/{name}"))
                    made[kind.removeprefix(f"{NUMBERS}/")] = make_number(inner, group, parameter, value)
                else:
                    made[kind] = _laid_like(states.read_like(f"{kind}/{name}", parameter), parameter)
            if made:
                inner.state[parameter] = made


def _laid_like(value: Tensor, parameter: Tensor) -> Tensor:
    """The value on the parameter's device, laid over the ranks as the parameter is."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value


def _parameter_names(module: nn.Module) -> dict[int, str]:
    names: dict[int, str] = {}
    for name, value in _named(module):
        names.setdefault(id(value), name)
    return names


def _by_parameter(states: TensorFile) -> dict[str, list[str]]:
    """Parameter's name -> the kinds of state there are of it."""
    kinds: dict[str, list[str]] = {}
    for key in sorted(states.names):
        parts = key.split("/", 2 if key.startswith(f"{NUMBERS}/") else 1)
        kinds.setdefault(parts[-1], []).append("/".join(parts[:-1]))
    return kinds


def _require_names(module: nn.Module, weights: TensorFile) -> None:
    names = {name for name, _ in _named(module)}
    differing = sorted(names ^ weights.names)
    if differing:
        raise ValueError(
            f"{weights.path} must hold the model's {len(names)} tensors, got {len(weights.names)}, which differ "
            f"({differing[0]}). HINT: it is of another model."
        )


def _require_no_master(by_name: dict[str, list[str]], states: TensorFile) -> None:
    if any(MASTER in kinds for kinds in by_name.values()):
        raise ValueError(
            f"{states.path} must be gone on with under ZeRO 1 or 2: DMGC's pull left the ranks with weights that are "
            "not the owners', and the difference would be lost, got another engine. HINT: the DeepSpeed JSON of the "
            "first start."
        )


def _require_optimizer(present: dict[str, Any], saved: dict[str, Any], *, betas_move: bool) -> None:
    for name in sorted(present.keys() & saved.keys()):
        one, other = present[name], saved[name]
        if name == "betas" and betas_move:
            one, other = one[1:], other[1:]
        if one != other:
            raise ValueError(
                f"the optimizer's {name} must be the checkpoint's, {other}, to continue it, got {one}. "
                "HINT: --optim, or the optimizer section of the DeepSpeed JSON."
            )


def _facts(accelerator: Accelerator, inner: Any) -> dict[str, Any]:
    scaler, engine = _scaler(accelerator), _engine(accelerator)
    return {
        "optimizer": describe_optimizer(inner),
        "loss_scale": None if scaler is None else dict(scaler.state_dict()),  # numbers
        "engine": None if engine is None else {name: int(getattr(engine, name)) for name in COUNTS},
    }


def _put_scale(scaler: Any, saved: dict[str, Any]) -> None:
    present = scaler.state_dict()
    if present.keys() != saved.keys() or any(type(saved[name]) is not type(value) for name, value in present.items()):
        raise ValueError(f"a loss scale must be {present}, with other numbers, got {saved}. HINT: another checkpoint.")
    scaler.load_state_dict(saved)


def _engine(accelerator: Accelerator) -> Any:
    """DeepSpeed's engine, or None."""
    wrapped = getattr(accelerator, "deepspeed_engine_wrapped", None)
    return None if wrapped is None else wrapped.engine


def _zero_optimizer(accelerator: Accelerator) -> Any:
    """The optimizer that owns partitions, or None: under ZeRO 0 each rank has the whole one."""
    engine = _engine(accelerator)
    if engine is None or not int(engine.zero_optimization_stage()):
        return None
    check_seams("deepspeed", "zero3", "zero12", "state zero3")
    return engine.optimizer


def _scaler(accelerator: Accelerator) -> Any:
    """The loss scale's keeper, or None."""
    engine = _engine(accelerator)
    return accelerator.scaler if engine is None else autocast_scaler(engine)
