"""Parameters that an engine holds in shards: refused, or gathered once around a partition's forward and backward."""

from typing import Any

import torch
from torch import Tensor, nn


class _Anchored(torch.autograd.Function):
    """The identity on a module's output, as a function of the anchor too."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def give_anchor(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Give a module under ZeRO-3 one more input, an empty tensor that requires gradient.

    DeepSpeed reduces the gradients of a leaf module, and frees its parameters, once those of its inputs are known.
    Tiles require none: it would do so before the module's backward, with gradients of zero.
    """
    trained = next((parameter for parameter in module.parameters() if parameter.requires_grad), None)
    if trained is None or not hasattr(trained, "ds_id") or not torch.is_grad_enabled():
        return None
    # On the parameters' device: its backward runs on their thread, after their gradients are in place.
    return *args, torch.empty(0, device=trained.device, requires_grad=True)


def is_anchor(value: Any) -> bool:
    """Whether an argument is the empty tensor that a leaf module of ZeRO-3 is given: see `give_anchor`."""
    return isinstance(value, Tensor) and value.shape == (0,) and value.requires_grad


def anchored(out: Tensor, anchor: Tensor | None) -> Tensor:
    """The output as a function of the anchor too, where there is one: see `give_anchor`."""
    return out if anchor is None else _Anchored.apply(out, anchor)


def refuse_shards(module: nn.Module) -> None:
    """Chunks run the submodules many times: parameters must be whole for the whole forward, and backward."""
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "ds_id") and getattr(parameter, "ds_z3_leaf_module", None) is not module:
            raise ValueError(
                f"a partitioned {type(module).__name__} must be gathered as a whole by ZeRO-3, got {name!r} outside "
                "of a leaf module. HINT: deepspeed.utils.set_z3_leaf_module(encoder, True) before deepspeed.initialize."
            )
        if hasattr(parameter, "placements"):
            raise ValueError(
                f"a partitioned {type(module).__name__} must be one unit of FSDP2, got {name!r} in shards. "
                "HINT: fully_shard the encoder, not the layers in it."
            )
