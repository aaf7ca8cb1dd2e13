"""Gradients of a call: which values need one, and the parameters' sums over the chunks."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from ds_wsi.partition.graph.contexts import is_detached
from ds_wsi.partition.graph.trace import Traced
from ds_wsi.runtime.seams import storage_key


class GradientSums:
    """Gradients of parameters, summed in float32 (float64 for float64), in the order of the chunks.

    Attributes:
        by_id: the sum so far of each parameter's gradients, by the parameter's id.
    """

    def __init__(self) -> None:
        self.by_id: dict[int, Tensor] = {}
        self._owned: set[int] = set()  # whose sums nobody else holds

    def add(self, parameters: list[nn.Parameter], gradients: list[Tensor | None], output_grads: list[Tensor]) -> None:
        """Add a chunk's gradients; `gradients` is emptied as it is summed.

        Args:
            parameters: the parameters whose gradients they are.
            gradients: one chunk's, from autograd.
            output_grads: what flowed into the chunk's graph.
        """
        # autograd may hand out one tensor several times, or what flowed in: such a one must not be added to in place.
        places = [_place(tensor) for tensor in (*gradients, *output_grads) if tensor is not None]
        for index, parameter in enumerate(parameters):
            gradient, gradients[index] = gradients[index], None
            if gradient is None:
                continue
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            key = id(parameter)
            owned = wide is not gradient or places.count(_place(gradient)) == 1
            if key not in self.by_id:
                self.by_id[key] = wide
                if owned:
                    self._owned.add(key)
            elif key in self._owned:
                self.by_id[key].add_(wide)
            else:
                self.by_id[key] = self.by_id[key] + wide
                self._owned.add(key)


def _place(tensor: Tensor) -> int:
    """Equal for tensors of one memory; an embedding's sparse gradient has none of its own."""
    return id(tensor) if tensor.layout is not torch.strided else storage_key(tensor)


def gradient_needs(traced: Traced, wants_input_grad: bool) -> dict[fx.Node, bool]:
    """Whether a gradient has to reach each value of a graph, whose input needs one where `wants_input_grad`."""
    needs = {traced.source: wants_input_grad} | dict.fromkeys(traced.arguments, False)
    for node in traced.nodes:
        needed = False
        if node in traced.leaves:
            needed = any(parameter.requires_grad for parameter in traced.leaves[node].parameters())
        elif node.op == "get_attr":
            value: Any = traced.module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            needed = isinstance(value, Tensor) and value.requires_grad
        needed = needed or any(needs[parent] for parent in node.all_input_nodes)
        needs[node] = needed and not is_detached(node)
    return needs
