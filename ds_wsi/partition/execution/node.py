"""A call of a partitioned module as one node of autograd's graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ds_wsi.partition.execution.call import PartitionedCall
from ds_wsi.partition.module.beside import inside
from ds_wsi.partition.module.surroundings import once_differentiable, refuse_batched


class PartitionedNode(torch.autograd.Function):
    """The whole module as one node of autograd's graph: each parameter receives its gradient once."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, call: PartitionedCall, x: Tensor, anchor: Tensor | None, *parameters: nn.Parameter
    ) -> Tensor:
        ctx.carrier = call.carrier
        ctx.call, ctx.parameters, ctx.x_device = call, parameters, x.device
        ctx.flags = [(part, part.training) for part in call.program.traced.module.modules()]
        return call.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # noqa: D102
        if ctx.call is None:
            raise RuntimeError(
                "a partitioned module's backward must run once, got a second one. HINT: call forward again; "
                "retain_graph does not keep what was freed."
            )
        refuse_batched(grad)
        call, parameters, ctx.call, ctx.parameters = ctx.call, ctx.parameters, None, None
        with inside(), _training_as(ctx.flags):
            x_grad, sums = call.backward(grad)
        gradients = [sums.get(id(parameter)) for parameter in parameters]
        if grad.shape[0] == 0:  # a rank without a tile: engines wait for a gradient of every parameter
            gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
        pairs = zip(_apart(gradients), parameters, strict=True)
        if x_grad is not None:
            x_grad = x_grad.to(ctx.x_device)  # a host input's gradient is expected there
        return None, x_grad, None, *(None if gradient is None else gradient.to(p.dtype) for gradient, p in pairs)


def _apart(gradients: list[Tensor | None]) -> list[Tensor | None]:
    """The gradients, none in memory of another.

    Autograd keeps them as `.grad` and adds the next call's in place. Of one tile the gradient of a token is a part of
    that of all positions, as it is: what is added to one would be added to the other.
    """
    seen: set[int] = set()
    apart: list[Tensor | None] = []
    for gradient in gradients:
        if gradient is not None and gradient.layout == torch.strided:
            memory = gradient.untyped_storage()
            if memory.data_ptr() in seen or memory.nbytes() > gradient.numel() * gradient.element_size():
                gradient = gradient.clone()
            seen.add(gradient.untyped_storage().data_ptr())
        apart.append(gradient)
    return apart


@contextmanager
def _training_as(flags: list[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Backward computes again what forward did, whatever `train` and `eval` were called in between."""
    present = [(part, part.training) for part, _ in flags]
    for part, training in flags:
        part.training = training
    try:
        yield
    finally:
        for part, training in present:
            part.training = training
