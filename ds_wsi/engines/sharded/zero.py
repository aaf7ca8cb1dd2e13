"""Whole parameters of a model that ZeRO-3 shards over the ranks, and the modules that it gathers as one."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.engines.sharded.fsdp import whole
from ds_wsi.partition.forward import PartitionedForward
from ds_wsi.partition.module.shards import is_anchor
from ds_wsi.runtime.contracts import Packs
from ds_wsi.runtime.forwards import Handle


def gather_as_one(model: nn.Module) -> None:
    """Make partitioned modules, and aggregators of one bag at a time, ZeRO-3's leaf modules; before DeepSpeed wraps it.

    A partition runs the submodules once per chunk and pass: as a leaf the module is gathered once around its forward
    and once around its backward, however many chunks or bags a rank has, and its gradients are reduced once.
    """
    from deepspeed.utils import set_z3_leaf_module

    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), PartitionedForward):
            set_z3_leaf_module(module, True)
        elif _computes_bag_by_bag(module) and not isinstance(module.__dict__.get("forward"), _TiedForward):
            set_z3_leaf_module(module, True)
            Handle(module, _TiedForward(module.forward), "the tie of a leaf module of ZeRO-3")
            module.register_forward_pre_hook(_give_tie)


def _computes_bag_by_bag(module: nn.Module) -> bool:
    return isinstance(module, Packs) and module.packed is False


class _TiedForward:
    """The forward of a leaf module whose tensors come in a StackedBags.

    DeepSpeed reduces a leaf's gradients once those of its inputs are known, and torch's hook for that sees tensors
    among the arguments alone, not in tuples: without one it fires at once, with gradients of zero. So there is one, and
    the bags' values are tied to it.
    """

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, bags: Any, *more: Any) -> Any:
        if more and is_anchor(more[-1]):
            bags, more = bags._replace(values=_Tied.apply(bags.values, more[-1])), more[:-1]
        return self.original(bags, *more)


class _Tied(torch.autograd.Function):
    """The identity on values, whose backward is the last of the module's: then the tie's gradient is known."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, tie: Tensor) -> Tensor:
        ctx.tie = tie.shape, tie.dtype, tie.device
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        shape, dtype, device = ctx.tie
        return grads[0], torch.zeros(shape, dtype=dtype, device=device)


def _give_tie(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not torch.is_grad_enabled() or not is_zero3(module):
        return None
    return *args, torch.empty(0, device=args[0].values.device, requires_grad=True)


def is_zero3(model: nn.Module) -> bool:
    """Whether the parameters of `model` are partitioned over the ranks by ZeRO-3."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Whole parameters and buffers on the CPU, floating ones in float32, at every ZeRO stage, under FSDP2 and DDP.

    Every rank gets them. At ZeRO-3 and under FSDP2 one parameter at a time is gathered (one all-gather each), so that
    the device never holds the whole model.

    Args:
        model: the unwrapped module, whose names the keys are.
    """
    partitioned = is_zero3(model)
    parameters = dict(model.named_parameters())
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        with gathered(parameters[name]) if partitioned and name in parameters else nullcontext():
            copy = whole(value).to("cpu", torch.float32 if value.is_floating_point() else value.dtype, copy=True)
        state[name] = copy
    return state


def gathered(parameter: Tensor, modifier_rank: int | None = None) -> Any:
    """A context in which a parameter of ZeRO-3 is whole; what `modifier_rank` writes into it is every rank's after."""
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier_rank)
